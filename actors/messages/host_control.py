"""What the coordinator asks of an expert host, and the statistics that a host returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from actors.messages.transfer_orders import Assembly, Blob, Stored
from cluster.topology import HostInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """What an expert host holds and did, for status and for leak tests.

    Attributes:
        step: steps committed so far.
        kept: FORWARDs whose BACKWARD or RELEASE has not come.
        kept_bytes: what they hold.
        parameters: parameters of the host's experts.
        requests: requests answered, by phase name.
        rows: rows computed.
        busy_seconds: spent on computing, summed over threads; waiting is not computing.
        in_flight: requests being handled now.
        epochs: that requests are answered of, the current one among them.
        experts: how many of each layer the current epoch has here.
        failed_pushes: copies of snapshots that did not reach a buddy.
    """

    id: str
    step: int
    epoch: int
    kept: int
    kept_bytes: int
    parameters: int
    requests: dict[str, int]
    rows: int
    busy_seconds: float = 0.0
    in_flight: int = 0
    epochs: tuple[int, ...] = ()
    experts: Mapping[int, int] = field(default_factory=dict)
    failed_pushes: int = 0


class HostControl(Protocol):
    """What the coordinator asks of an expert host: `ExpertHost` itself, or a client of one."""

    def seal(self, step: int, epoch: int | None = None) -> None:
        """Take no more gradients of a step: what `prepare` fetches from other holders is complete."""
        ...

    def prepare(self, step: int, epoch: int | None = None) -> float:
        """Seal the gradients of a step of this epoch; the sum of their squares, in float64."""
        ...

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        """Apply the optimizer step; a repeat does nothing."""
        ...

    def save(self, directory: str, epoch: int | None = None) -> Sequence[str]:
        """Write own experts and moments into a checkpoint; the names of the files written."""
        ...

    def assemble(self, order: Assembly) -> None:
        """Put the experts of a new epoch together beside those in use; a repeat does nothing."""
        ...

    def retain(self, *epochs: int) -> None:
        """Go on with the experts of these epochs, the last above all, and drop every other."""
        ...

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Copy the state aside, and send it to buddies in the background; a repeat does nothing."""
        ...

    def inventory(self) -> Sequence[Stored]:
        """What the host keeps in memory: snapshots, its own and others', and blobs."""
        ...

    def put(self, blob: Blob) -> None:
        """Keep named tensors for a step."""
        ...

    def get(self, name: str, step: int) -> Blob:
        """What was put."""
        ...

    def ping(self, timeout: float) -> None:
        """Answer within so many seconds."""
        ...

    def close(self) -> None:
        """Hang up; calls under way fail."""
        ...

    def loads(self) -> Tensor:
        """[L, E] int64, rows computed for each expert since the host began."""
        ...

    def stats(self) -> HostStats:
        """Counters."""
        ...


__all__ = ["HostControl", "HostStats"]
