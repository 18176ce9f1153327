"""Orders to the hosts by which together they hold a version of the weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.messages.coordinator_state import PlacedWeights
from actors.messages.transfer_orders import Assembly, Origin
from cluster.placement import Holding, Placement, experts_to_fetch
from cluster.topology import HostInfo

Sources = Sequence[Sequence[Sequence[str]]]
"""`[L][E]` -> ids of the hosts that an expert's state can be fetched from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSpec:
    """The experts that are placed, and their numbers of replicas.

    Attributes:
        layers: Model layer index of each row of a placement.
        n_experts: Routed experts of a layer.
        n_group: Expert groups of a layer.
        replicas: Least number of hosts that hold each expert.
        redundant: Further replicas of hot experts in each layer.
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
    """A version that hosts are to assemble, and where they get its experts.

    Attributes:
        version: The version, with its placement.
        sources: Hosts that have each expert; an expert without a source is read from `version.directory`.
        base: Epoch whose live state is fetched; None fetches snapshots.
        moments: Whether the directory has the optimizer's moments too.
    """

    version: PlacedWeights
    sources: Sources
    base: int | None = None
    moments: bool = False


def assemblies(
    plan: TransferPlan, infos: Mapping[str, HostInfo], layers: Sequence[int], step: int | None
) -> dict[str, Assembly]:
    """Host id -> order, for every host, including those that are to hold nothing.

    Args:
        plan: The version to assemble.
        infos: Host id -> description, of the live hosts.
        layers: Model layer index of each row.
        step: In training, the step that the state is for.
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
    """The order for one host; see `assemblies`.

    Args:
        id: The host.
        rows: For each layer row, the experts that it is to hold.
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
                peer = there[(at + expert) % len(there)]  # spread over the hosts that have it
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
        if id in infos  # a dead host is left out, and the change will fail
    )


def no_sources(placement: Placement) -> Sources:
    """Sources of a version that is read from its directory."""
    return [[()] * len(row) for row in placement.holders]


def arrivals(placement: Placement, held: Holding) -> int:
    """Number of experts that hosts have to fetch, since they do not hold them."""
    fetched = experts_to_fetch(placement, held)
    return sum(len(experts) for rows in fetched.values() for experts in rows.values())


__all__ = ["PlacementSpec", "Sources", "TransferPlan", "arrivals", "assemblies", "assembly", "no_sources"]
