"""How experts' state moves between hosts: orders to put an epoch together, and what hosts keep in memory."""

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
    """A host to pull experts from, and which."""

    host: HostInfo
    experts: ExpertIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a host shall hold under a new epoch, and where it gets it from.

    An expert that the host has itself (live in `base`, or in its own snapshot of `step`) is taken from
    there, else from the origin that names it, else from the directory.

    Attributes:
        epoch: the new one.
        experts: all that the host holds under it; maybe none.
        base: epoch whose live state is taken, here and at the origins; None takes snapshots of `step`.
        step: the step that the state is for, in training; None in serving.
        origins: peers, each with the experts that it has.
        directory: a checkpoint for whatever is left; None when nothing may be.
        moments: whether the optimizer's moments are read from the directory too; else they are zeros.
        shared: in training, other holders of experts that this host holds, each with those: gradients are
            summed over them.
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
    """What one host asks of another: the state of some experts.

    Attributes:
        experts: which, in the order of the answer.
        base: epoch whose live state it shall be; None takes what is kept of `step`.
        step: the step that the state is for; None in serving.
        moments: whether the optimizer's moments come too.
        gradients: the gradients of `step` instead, once they are sealed.
    """

    experts: ExpertIds
    base: int | None = None
    step: int | None = None
    moments: bool = False
    gradients: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blob:
    """Named tensors that somebody leaves in a host's memory, for a step.

    Attributes:
        note: whatever text belongs to them, as JSON.
    """

    name: str
    step: int
    tensors: Mapping[str, Tensor]
    note: str = ""


EXPERTS = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One complete entry of a host's memory.

    Attributes:
        kind: `experts`, or the name of a blob (`trunk`).
        of: the host whose experts they are, or the blob's name.
        step: the step that the state is for.
        epoch: in which the experts were copied; -1 for a blob.
        experts: which they are.
        pushed: buddies that have a copy of this host's own.
        failed: buddies that have none -> why.
    """

    kind: str
    of: str
    step: int
    epoch: int = -1
    experts: ExpertIds = field(default_factory=dict)
    pushed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """What a host asks of another one; `HostClient` is one."""

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """Frames with the state of experts; see `actors.messages.tensor_stream.fill`."""
        ...

    def store(self, frames: Iterator[bytes]) -> None:
        """Keep what the frames carry."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


def pairs(experts: ExpertIds) -> Iterator[tuple[int, int]]:
    """(layer, expert) of all, in their order."""
    for layer, ids in experts.items():
        for expert in ids:
            yield layer, expert


def grouped(some: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """The inverse of `pairs`, for pairs whose layers follow one another."""
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
    "Stored",
    "grouped",
    "pairs",
]
