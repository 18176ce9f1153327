"""Orders that move expert state between hosts, and descriptions of the copies that hosts keep in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cluster.topology import HostInfo

ExpertIds = Mapping[int, tuple[int, ...]]
"""Model layer index -> ids of experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A host that experts are pulled from.

    Attributes:
        host: The host.
        experts: The experts that it has.
    """

    host: HostInfo
    experts: ExpertIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """The experts that a host holds under a new epoch, and the sources of their state.

    An expert that the host has itself (live in `base`, or in its own snapshot of `step`) is taken from there;
    otherwise from the origin that names it; otherwise from the directory.

    Attributes:
        epoch: The new epoch.
        experts: All experts that the host holds under it; may be empty.
        base: Epoch whose live state is taken, here and at the origins; None takes snapshots of `step`.
        step: The step that the state is for, in training; None in serving.
        origins: Other hosts, each with the experts that it has.
        directory: Checkpoint for the remaining experts; None does not allow any.
        moments: Whether the optimizer's moments are read from the directory, too; otherwise they are zeros.
        shared: In training, other holders of this host's experts, each with the experts that both hold;
            gradients are summed over them.
    """

    epoch: int
    experts: ExpertIds
    base: int | None = None
    step: int | None = None
    origins: tuple[Origin, ...] = ()
    directory: str | None = None
    moments: bool = False
    shared: tuple[Origin, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A request of one host to another for the state of experts.

    Attributes:
        experts: The experts, in the order of the answer.
        base: Epoch whose live state is requested; None requests a snapshot of `step`.
        step: The step that the state is for; None in serving.
        moments: Whether the optimizer's moments are requested, too.
        gradients: Whether the sealed gradients of `step` are requested in place of the state.
    """

    experts: ExpertIds
    base: int | None = None
    step: int | None = None
    moments: bool = False
    gradients: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blob:
    """Named tensors of a step that a worker stores in a host's memory.

    Attributes:
        name: Name of the blob, such as `trunk`.
        step: Step that the tensors are for.
        tensors: The tensors, by name.
        note: JSON stored with them.
    """

    name: str
    step: int
    tensors: Mapping[str, Tensor]
    note: str = ""


EXPERTS = "experts"
"""Kind of a `StoredCopy` of a host's experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCopy:
    """Description of a complete copy in a host's memory.

    Attributes:
        kind: `experts`, or the name of a blob (`trunk`).
        owner: Id of the host whose experts these are, or the name of the blob.
        step: The step that the state is for.
        epoch: Epoch in which the experts were copied; -1 for a blob.
        experts: The experts in the copy.
        pushed: Buddies that have received the host's own copy.
        failed: Buddy -> error text, for buddies that have not.
    """

    kind: str
    owner: str
    step: int
    epoch: int = -1
    experts: ExpertIds = field(default_factory=dict)
    pushed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """Calls of one expert host to another, implemented by `ExpertHost` and `HostClient`."""

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """The state of experts, as frames of `actors.messages.tensor_stream`.

        Raises:
            ProtocolError: the host does not have an expert, or not at the step requested.
        """
        ...

    def store(self, frames: Iterator[bytes]) -> None:
        """Keep the copy that the frames carry."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def pairs(experts: ExpertIds) -> Iterator[tuple[int, int]]:
    """All pairs (layer, expert), in order."""
    for layer, ids in experts.items():
        for expert in ids:
            yield layer, expert


def grouped(some: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """The inverse of `pairs`, for pairs ordered by layer."""
    found: dict[int, list[int]] = {}
    for layer, expert in some:
        found.setdefault(layer, []).append(expert)
    return {layer: tuple(ids) for layer, ids in found.items()}


__all__ = [
    "EXPERTS",
    "Assembly",
    "Blob",
    "ExpertIds",
    "Origin",
    "Peer",
    "Pull",
    "StoredCopy",
    "grouped",
    "pairs",
]
