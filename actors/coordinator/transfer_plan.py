"""What each host has to do so that all of them together hold a version of the weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.messages.coordinator_state import PlacedWeights
from actors.messages.transfer_orders import Assembly, Origin
from cluster.placement import Holding, Placement
from cluster.topology import HostInfo

Sources = Sequence[Sequence[Sequence[str]]]
"""`[L][E]` -> ids of the hosts that an expert's state can be taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
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

    @property
    def replicated(self) -> bool:
        """Whether an expert may have several holders."""
        return self.replicas > 1 or self.redundant > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
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
    plan: TransferPlan, infos: Mapping[str, HostInfo], layers: Sequence[int], step: int | None
) -> dict[str, Assembly]:
    """An order for every host, those that are to hold nothing among them.

    Args:
        infos: of hosts that can be asked.
        layers: model layer index of each row.
        step: in training, the step that the state is for.
    """
    held = plan.version.placement.holding()
    nothing_held: tuple[tuple[int, ...], ...] = ((),) * len(layers)
    return {id: assembly(id, held.get(id, nothing_held), plan, infos, layers, step) for id in infos}


def assembly(
    id: str,
    rows: Sequence[Sequence[int]],
    plan: TransferPlan,
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
            for other in plan.version.placement.holders[at][expert] if step is not None else ():
                if other != id:
                    shared.setdefault(other, {}).setdefault(layers[at], []).append(expert)
            there = [other for other in plan.sources[at][expert] if other in infos]
            if id not in there and there:
                peer = there[(at + expert) % len(there)]  # spread over those that have it
                pulls.setdefault(peer, {}).setdefault(layers[at], []).append(expert)
    return Assembly(
        epoch=plan.version.epoch,
        experts={layer: tuple(experts) for layer, experts in zip(layers, rows, strict=True) if experts},
        base=plan.base,
        step=step,
        origins=_origins(pulls, infos),
        directory=plan.version.directory,
        moments=plan.moments,
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


def no_sources(placement: Placement) -> Sources:
    """Sources where there are none."""
    return [[()] * len(row) for row in placement.holders]


def arrivals(placement: Placement, held: Holding) -> int:
    """How many experts hosts have to get that they do not hold."""
    found = 0
    for id, rows in placement.holding().items():
        before = held.get(id, ((),) * len(rows))
        found += sum(len(set(row) - set(old)) for row, old in zip(rows, before, strict=True))
    return found


__all__ = ["PlacementSpec", "Sources", "TransferPlan", "arrivals", "assemblies", "assembly", "no_sources"]
