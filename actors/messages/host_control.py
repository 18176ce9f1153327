"""What the coordinator asks of an expert host, and the statistics that a host returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from actors.messages.transfer_orders import Assembly, Blob, StoredCopy
from cluster.topology import HostInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """Statistics of an expert host.

    Attributes:
        id: Id of the host.
        step: Steps committed so far.
        epoch: The current epoch.
        kept: FORWARD requests whose BACKWARD or RELEASE has not arrived.
        kept_bytes: Bytes of activations kept for them.
        parameters: Parameters of the host's experts.
        requests: Phase name -> requests answered.
        rows: Rows computed.
        busy_seconds: Seconds of computing, summed over threads.
        in_flight: Requests under way.
        epochs: Epochs whose requests are answered, the current one included.
        experts: Layer -> number of its experts that this host holds in the current epoch.
        failed_pushes: Copies of snapshots that did not reach their buddy.
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
    """Commands to an expert host, implemented by `ExpertHost` and by its client."""

    def seal(self, step: int, epoch: int | None = None) -> None:
        """Accept no more gradients of a step, so that other holders can fetch them in `prepare`."""
        ...

    def prepare(self, step: int, epoch: int | None = None) -> float:
        """Seal the gradients of a step in this epoch; returns the sum of their squares, in float64."""
        ...

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        """Apply the optimizer step; a repeat does nothing."""
        ...

    def save(self, directory: str, epoch: int | None = None) -> Sequence[str]:
        """Write the host's experts and moments into a checkpoint; returns the names of the files."""
        ...

    def assemble(self, order: Assembly) -> None:
        """Assemble the experts of a new epoch beside those in use; a repeat does nothing."""
        ...

    def retain(self, *epochs: int) -> None:
        """Keep the experts of these epochs, the last as the current one, and drop all others."""
        ...

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Keep a snapshot of the state, and send it to buddies in the background; a repeat does nothing."""
        ...

    def inventory(self) -> Sequence[StoredCopy]:
        """Descriptions of what the host keeps in memory: snapshots, its own and other hosts', and blobs."""
        ...

    def put(self, blob: Blob) -> None:
        """Keep named tensors of a step."""
        ...

    def get(self, name: str, step: int) -> Blob:
        """The named tensors of a step that were kept."""
        ...

    def ping(self, timeout: float) -> None:
        """Answer within `timeout` seconds."""
        ...

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        ...

    def loads(self) -> Tensor:
        """Rows computed for each expert since the host began, `[L, E]` int64."""
        ...

    def stats(self) -> HostStats:
        """Statistics of the host."""
        ...


__all__ = ["HostControl", "HostStats"]
