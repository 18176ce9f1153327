"""Placement of experts on hosts: pure functions without I/O.

Shapes: L layers with routed experts, E routed experts of a layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.count_placement import place_by_count
from cluster.load_placement import place_by_load
from cluster.topology import Holders
from errors import ConfigError

Holding = Mapping[str, tuple[tuple[int, ...], ...]]
"""Host id -> for each layer row, the ids of the experts that it holds, ascending."""


@dataclass(frozen=True, slots=True)
class Site:
    """A live host that may hold experts.

    Attributes:
        id: Id of the host.
        node: Machine that it runs on, and fails with.
    """

    id: str
    node: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Which hosts hold which experts.

    Attributes:
        sites: Ids of the hosts.
        holders: `[L][E]` -> ids of the hosts that hold the expert, in the order of its replicas.
    """

    sites: tuple[str, ...]
    holders: tuple[tuple[tuple[str, ...], ...], ...]

    def indices(self) -> Holders:
        """`holders` as indices into `sites`, as in a routing table."""
        index = {site: at for at, site in enumerate(self.sites)}
        return tuple(tuple(tuple(index[host] for host in hosts) for hosts in row) for row in self.holders)

    @property
    def complete(self) -> bool:
        """Whether every expert has a holder."""
        return all(hosts for row in self.holders for hosts in row)

    def without(self, host: str) -> Placement:
        """The same placement without a host; experts that only this host held have no holder."""
        return Placement(
            sites=tuple(site for site in self.sites if site != host),
            holders=tuple(
                tuple(tuple(id for id in ids if id != host) for ids in row) for row in self.holders
            ),
        )

    def holding(self) -> Holding:
        """The experts of every host."""
        held: dict[str, list[list[int]]] = {site: [[] for _ in self.holders] for site in self.sites}
        for layer, row in enumerate(self.holders):
            for expert, hosts in enumerate(row):
                for host in hosts:
                    held[host][layer].append(expert)
        return {site: tuple(tuple(experts) for experts in rows) for site, rows in held.items()}


def plan(
    sites: Sequence[Site],
    *,
    n_layers: int,
    n_experts: int,
    n_group: int,
    replicas: int = 1,
    redundant: int = 0,
    loads: ArrayLike | None = None,
    held: Holding | None = None,
) -> Placement:
    """Place every expert on `replicas` hosts, and the hottest ones on more.

    A host never holds two replicas of an expert, and a node never all of them if there are two nodes.

    Without loads the experts are placed by counts, groups kept together as in `plan_placement`, and without
    the redundant replicas, since no expert is known to be hot. With loads the hosts of a layer hold equal
    numbers of experts (or one more), chosen so that the highest load is low; groups stay on one host or node
    where that does not cost balance.

    With `held`, experts move as little as possible: a host that joins gets its share, and of a host that is
    gone only its own experts move. With loads too, experts change places until the hosts are as balanced as
    in a placement from nothing. Few moves have priority over groups: a host that joins may split a group.

    Args:
        sites: Live hosts with different ids; their order matters.
        n_layers: Layers with routed experts.
        n_experts: Routed experts of a layer, a multiple of `n_group`.
        n_group: Expert groups of the model.
        replicas: Hosts that hold each expert; capped at the number of sites.
        redundant: Further replicas in each layer, as far as there are hosts for them.
        loads: `[L, E]` tokens of each expert, or anything proportional to them.
        held: What hosts hold now; hosts that are not among `sites` are gone.

    Raises:
        ConfigError: No site, more sites than experts, or groups of unequal size.
        ValueError: Sites with equal ids, or `loads` or `held` of another shape.
    """
    home = plan_placement(n_layers if loads is None else 0, n_experts, n_group, len(sites))
    ids, nodes = tuple(site.id for site in sites), [site.node for site in sites]
    if len(set(ids)) < len(ids):
        raise ValueError(f"sites share an id: {', '.join(ids)}")
    holding = None if held is None else _held_by_index(held, ids, n_layers, n_experts)
    replicas = min(replicas, len(sites))
    if loads is None:
        holders = place_by_count(home, holding, n_group=n_group, nodes=nodes, replicas=replicas)
    else:
        weights = np.asarray(loads, dtype=np.float64)
        if weights.shape != (n_layers, n_experts) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"loads must be [{n_layers}, {n_experts}] finite numbers, none below 0")
        holders = place_by_load(
            weights, n_group=n_group, nodes=nodes, replicas=replicas, redundant=redundant, held=holding
        )
    # The same few combinations of hosts occur many times.
    named = {
        hosts: tuple(ids[host] for host in hosts) for hosts in {hosts for row in holders for hosts in row}
    }
    return Placement(sites=ids, holders=tuple(tuple(map(named.__getitem__, row)) for row in holders))


def experts_to_fetch(
    placement: Placement, held: Holding | None = None
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Experts that hosts have to fetch: host id -> layer row -> expert ids, ascending; no empty entries."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for host, rows in placement.holding().items():
        before = (held or {}).get(host, ())
        for layer, experts in enumerate(rows):
            there = set(before[layer]) if layer < len(before) else set()
            if fetched := tuple(expert for expert in experts if expert not in there):
                found.setdefault(host, {})[layer] = fetched
    return found


def host_loads(placement: Placement, loads: ArrayLike) -> NDArray[np.float64]:
    """Load of every host, `[L, H]`; an expert's load is split evenly among its replicas."""
    weights = np.asarray(loads, dtype=np.float64)
    index = {site: at for at, site in enumerate(placement.sites)}
    found = np.zeros((len(placement.holders), len(placement.sites)))
    for layer, row in enumerate(placement.holders):
        for expert, hosts in enumerate(row):
            for host in hosts:
                found[layer, index[host]] += weights[layer, expert] / len(hosts)
    return found


def balancedness(placement: Placement, loads: ArrayLike) -> NDArray[np.float64]:
    """Mean over highest load of the hosts, `[L]`: 1 is balanced or without load, 1 / H is all on one host."""
    found = host_loads(placement, loads)
    highest = found.max(axis=1, initial=0.0)
    ratio: NDArray[np.float64] = np.divide(
        found.mean(axis=1), highest, out=np.ones_like(highest), where=highest > 0
    )
    return ratio


def _held_by_index(
    held: Holding, ids: tuple[str, ...], n_layers: int, n_experts: int
) -> list[tuple[tuple[int, ...], ...]]:
    """Experts of each site; a host that is not in `held` holds none."""
    for host, rows in held.items():
        if len(rows) != n_layers or any(not 0 <= e < n_experts for row in rows for e in row):
            raise ValueError(f"held[{host!r}] must name experts below {n_experts} of {n_layers} layers")
    return [held.get(host, ((),) * n_layers) for host in ids]


def plan_placement(n_layers: int, n_experts: int, n_group: int, n_hosts: int) -> Holders:
    """Place the experts of every layer on hosts, groups kept together.

    With at most as many hosts as groups, a group is never split over hosts, so a token that node-limited
    routing confines to M groups touches at most M hosts (arXiv 2412.19437, section 2.1.2). With more hosts
    than groups, a host never holds experts of two groups. Counts differ by at most one group (or, within a
    group, one expert) between the hosts of a layer, and the hosts that hold more rotate from layer to layer.

    Args:
        n_layers: Layers with routed experts.
        n_experts: Routed experts of a layer, a multiple of `n_group`.
        n_group: Expert groups of the model.
        n_hosts: Hosts, 1 or more.

    Returns:
        One holder of each expert; every host holds at least one expert of every layer.

    Raises:
        ConfigError: No host, more hosts than experts, or groups of unequal size.
    """
    if n_hosts < 1:
        raise ConfigError(f"cluster.expert_hosts is {n_hosts}: a placement needs at least 1 host")
    if n_group < 1 or n_experts % n_group:
        raise ConfigError(
            f"model.n_routed_experts ({n_experts}) must be a multiple of model.n_group ({n_group})"
        )
    if n_hosts > n_experts:
        raise ConfigError(
            f"cluster.expert_hosts is {n_hosts}, but a layer has only {n_experts} routed experts "
            f"(model.n_routed_experts): use at most {n_experts} hosts"
        )
    slots = _host_slots(n_experts, n_group, n_hosts)
    even = len({slots.count(host) for host in range(n_hosts)}) == 1
    return tuple(
        tuple((slot if even else (slot + layer) % n_hosts,) for slot in slots) for layer in range(n_layers)
    )


def _host_slots(n_experts: int, n_group: int, n_hosts: int) -> tuple[int, ...]:
    """Host of each expert of one layer."""
    size = n_experts // n_group
    if n_hosts <= n_group:
        # Group g of G goes to host floor(g·H/G): consecutive groups, sizes that differ by at most one.
        return tuple((expert // size) * n_hosts // n_group for expert in range(n_experts))
    slots: list[int] = []
    for group in range(n_group):
        first, last = group * n_hosts // n_group, (group + 1) * n_hosts // n_group
        slots.extend(first + at * (last - first) // size for at in range(size))
    return tuple(slots)


__all__ = [
    "Holding",
    "Placement",
    "Site",
    "balancedness",
    "experts_to_fetch",
    "host_loads",
    "plan",
    "plan_placement",
]
