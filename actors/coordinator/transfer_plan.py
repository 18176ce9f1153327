"""What each host has to do so that all of them together hold a version of the weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.coordinator.routing_tables import holding
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.transfer_orders import Assembly, Origin
from cluster.placement import Holding, Placement
from cluster.topology import HostInfo

Sources = Sequence[Sequence[Sequence[str]]]
"""`[L][E]` -> ids of the hosts that an expert's state can be taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is placed, and how often.

    Attributes:
        layers: model layer index of each row of a placement.
        replicas: least number of hosts that hold each expert.
        redundant: further replicas of hot experts, in each layer.
    """

    layers: tuple[int, ...]
    n_experts: int
    n_group: int
    replicas: int = 1
    redundant: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A version that hosts are to put together.

    Attributes:
        version: its placement says who is to hold what.
        sources: of each expert; where there is none, it is read from `version.directory`.
        base: epoch whose live state is taken; None takes snapshots.
        moments: whether the directory has the optimizer's state too.
    """

    version: PlacedWeights
    sources: Sources
    base: int | None = None
    moments: bool = False


def assemblies(
    work: Work, infos: Mapping[str, HostInfo], layers: Sequence[int], step: int | None
) -> dict[str, Assembly]:
    """An order for every host, those that are to hold nothing among them.

    Args:
        infos: of hosts that can be asked.
        layers: model layer index of each row.
        step: in training, the step that the state is for.
    """
    held = holding(work.version.placement)
    nothing_held: tuple[tuple[int, ...], ...] = ((),) * len(layers)
    return {id: assembly(id, held.get(id, nothing_held), work, infos, layers, step) for id in infos}


def assembly(
    id: str,
    rows: Sequence[Sequence[int]],
    work: Work,
    infos: Mapping[str, HostInfo],
    layers: Sequence[int],
    step: int | None,
) -> Assembly:
    """What one host has to do.

    Args:
        rows: per layer row the experts that it is to hold.
    """
    pulls: dict[str, dict[int, list[int]]] = {}
    shared: dict[str, dict[int, list[int]]] = {}
    for at, experts in enumerate(rows):
        for expert in experts:
            for other in work.version.placement.holders[at][expert] if step is not None else ():
                if other != id:
                    shared.setdefault(other, {}).setdefault(layers[at], []).append(expert)
            there = [other for other in work.sources[at][expert] if other in infos]
            if id not in there and there:
                peer = there[(at + expert) % len(there)]  # spread over those that have it
                pulls.setdefault(peer, {}).setdefault(layers[at], []).append(expert)
    return Assembly(
        epoch=work.version.epoch,
        experts={layer: tuple(experts) for layer, experts in zip(layers, rows, strict=True) if experts},
        base=work.base,
        step=step,
        origins=_origins(pulls, infos),
        directory=work.version.directory,
        moments=work.moments,
        shared=_origins(shared, infos),
    )


def _origins(
    wanted: Mapping[str, Mapping[int, Sequence[int]]], infos: Mapping[str, HostInfo]
) -> tuple[Origin, ...]:
    return tuple(
        Origin(host=infos[id], experts={layer: tuple(experts) for layer, experts in rows.items()})
        for id, rows in wanted.items()
        if id in infos  # else it is dead, and the change comes to nothing
    )


def nothing(placement: Placement) -> Sources:
    """Sources where there are none."""
    return [[()] * len(row) for row in placement.holders]


def arrivals(placement: Placement, held: Holding) -> int:
    """How many experts hosts have to get that they do not hold."""
    found = 0
    for id, rows in holding(placement).items():
        before = held.get(id, ((),) * len(rows))
        found += sum(len(set(row) - set(old)) for row, old in zip(rows, before, strict=True))
    return found


__all__ = ["Shape", "Sources", "Work", "arrivals", "assemblies", "assembly", "nothing"]
