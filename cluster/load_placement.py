"""Placement by load: hot experts get more replicas, and bin packing keeps the highest load of a host low.

As in deepseek-ai/EPLB, the expert with the highest load per replica is replicated, and the heaviest replica
goes to the host with the least load. In addition: any counts, replicas that span nodes, few moves from what
hosts hold, and exchanges of replicas between hosts until the highest load falls no more.

All layers are placed at the same time. Shapes: L layers, E experts, H hosts, N nodes, K slots of a host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.host_slots import HostSlots
from cluster.topology import Holders

_STAY = 1.01
"""Experts move only while the highest load is above this factor of the lowest reachable one."""
_HEAVY = (0.5, 0.4)
"""Shares of a host's mean load above which a replica should not share its host with another such one."""
_IDLE = 2
"""Redundant replicas that may go to the coldest experts, where more replicas of hot ones do not help."""
_GOOD = 0.99
"""Balancedness above which no other numbers of replicas are tried."""
_ROUNDS = 8
"""Rounds of exchanges between all hosts in pairs, before exchanges of the busiest host."""
_TOGETHER = 1.003
"""Highest load that keeping groups together may cost, as a factor of the lowest reachable one."""
_UNEVEN = 1.02
"""Load per host of whole groups, as a factor of the highest load wanted, above which groups are not kept."""


def place_by_load(
    loads: NDArray[np.float64],
    *,
    n_group: int,
    nodes: Sequence[str],
    replicas: int,
    redundant: int,
    held: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Holders:
    """Holders of each expert, in the order of replicas.

    Args:
        loads: `[L, E]` load of each expert, 0 or more.
        n_group: Expert groups of a layer.
        nodes: `[H]` node of each host.
        replicas: Least number of holders of each expert, at most H.
        redundant: Further replicas in each layer.
        held: `[H][L]` expert ids that each host holds; None places from nothing.
    """
    n_experts = loads.shape[1]
    node_of = np.unique(np.asarray(nodes), return_inverse=True)[1].astype(np.int64)
    n_hosts, extra = len(nodes), min(redundant, n_experts * (len(nodes) - replicas))
    least = np.full(loads.shape, replicas, dtype=np.int64)
    # The placement from nothing shows the reachable balance, and is the result when nothing is held.
    free = _from_nothing(loads, add_replicas(loads, n_hosts, least, extra), node_of)
    layers = np.nonzero(free.load.mean(axis=1) < _GOOD * free.load.max(axis=1))[0]
    if extra and len(layers):
        tried = _other_replicas(loads[layers], n_hosts, least[layers], extra)
        other = _from_nothing(np.tile(loads[layers], (len(tried), 1)), np.concatenate(tried), node_of)
        highest = other.load.max(axis=1).reshape(len(tried), -1)
        best = highest.argmin(axis=0) * len(layers) + np.arange(len(layers))
        better = highest.min(axis=0) < free.load[layers].max(axis=1)
        free.take_over(layers[better], other, best[better])
    lowest = free.load.max(axis=1)
    copies = free.copies[:, :n_experts]
    if held is not None:
        hold = _held(held, n_experts)
        return _holders(_from_held(loads, copies, node_of, hold, replicas, lowest * _STAY, _uneven(free)))
    enough = lowest * _TOGETHER
    for domain in _domains(node_of, n_group):
        homes, uneven = _homes(loads, domain, n_group)
        layers = np.nonzero(uneven < _UNEVEN * enough)[0]
        if not len(layers):
            continue
        local = HostSlots(loads[layers], copies[layers], node_of)
        local.fill(homes[layers], domain)
        local.exchange(enough[layers])
        good = local.load.max(axis=1) <= enough[layers]
        free.take_over(layers[good], local, good)
    return _holders(free)


def _from_held(
    loads: NDArray[np.float64],
    copies: NDArray[np.int64],
    node_of: NDArray[np.int64],
    hold: NDArray[np.bool_],
    replicas: int,
    target: NDArray[np.float64],
    uneven: NDArray[np.int64],
) -> HostSlots:
    """What hosts hold, changed as little as the rules and the balance of a placement from nothing ask for.

    Args:
        loads: `[L, E]` load of each expert.
        copies: `[L, E]` replicas of each expert in the placement from nothing.
        node_of: `[H]` node of each host.
        hold: `[L, E, H]` whether a host holds an expert.
        replicas: Least number of holders of each expert.
        target: `[L]` highest load of a host that a placement from nothing reaches, with some tolerance.
        uneven: `[L]` difference between hosts' counts that a placement from nothing reaches.
    """
    now = hold.sum(axis=2).clip(replicas)
    missing = copies.sum(axis=1) - now.sum(axis=1)
    now = add_replicas(loads, len(node_of), drop_replicas(loads, now, replicas, -missing), missing)
    kept = HostSlots(loads, now, node_of, hold)
    kept.fill()
    kept.exchange(target)
    layers = np.nonzero((kept.load.max(axis=1) > target) & (now != copies).any(axis=1))[0]
    if len(layers):
        # Other experts are hot now: the numbers of replicas have to change too.
        other = HostSlots(loads[layers], copies[layers], node_of, hold[layers])
        other.fill()
        other.exchange(target[layers])
        better = other.load.max(axis=1) * _STAY < kept.load[layers].max(axis=1)
        kept.take_over(layers[better], other, better)
    # If what is held is as good as the result, nothing moves.
    many = hold.sum(axis=2)
    load = ((loads / np.maximum(many, 1))[:, None] @ hold)[:, 0]
    nodes = node_of == np.arange(node_of.max() + 1)[:, None]
    exposed = (len(nodes) > 1) & (many > 1) & ((hold @ nodes.T.astype(np.int64)).max(axis=2) == many)
    valid = (many >= replicas).all(axis=1) & (many.sum(axis=1) == copies.sum(axis=1)) & ~exposed.any(axis=1)
    better = kept.load.max(axis=1) * _STAY < load.max(axis=1)
    counts = np.ptp(hold.sum(axis=1), axis=1)
    evener = (_uneven(kept) < counts) & (uneven < counts)
    same = np.nonzero(valid & ~better & ~evener)[0]
    kept.hold[same, : loads.shape[1]] = hold[same]
    kept.copies[same, : loads.shape[1]] = many[same]
    return kept


def _uneven(slots: HostSlots) -> NDArray[np.int64]:
    """Difference between the most and the fewest experts of a host, `[L]`."""
    found: NDArray[np.int64] = np.ptp(slots.hold[:, : slots.n_experts].sum(axis=1), axis=1)
    return found


def _other_replicas(
    loads: NDArray[np.float64], n_hosts: int, least: NDArray[np.int64], extra: int
) -> list[NDArray[np.int64]]:
    """Other numbers of replicas (`[L, E]` each) to try where those by highest load cannot be balanced."""
    found = [add_replicas(loads, n_hosts, least, extra, heavy) for heavy in _HEAVY]
    for idle in range(1, min(_IDLE, extra) + 1):
        # An expert with one replica less may fill one host, where its halves would overfill two.
        hot = add_replicas(loads, n_hosts, least, extra - idle)
        coldest = np.where(hot < n_hosts, -loads, -np.inf)
        for _ in range(idle):
            expert = coldest.argmax(axis=1)
            hot[np.arange(len(loads)), expert] += 1
            coldest[np.arange(len(loads)), expert] = -np.inf
        if (hot <= n_hosts).all():
            found.append(hot)
    return found


def _from_nothing(
    loads: NDArray[np.float64], copies: NDArray[np.int64], node_of: NDArray[np.int64]
) -> HostSlots:
    slots = HostSlots(loads, copies, node_of)
    slots.fill()
    slots.level(_ROUNDS)
    slots.exchange(np.zeros(len(loads)))
    return slots


def add_replicas(
    loads: NDArray[np.float64],
    n_hosts: int,
    copies: NDArray[np.int64],
    extra: int | NDArray[np.int64],
    heavy: float | None = None,
) -> NDArray[np.int64]:
    """`copies` with `extra` more replicas in each layer, one by one to the highest load per replica.

    Args:
        loads: `[L, E]` load of each expert.
        n_hosts: Number of hosts, the most replicas of an expert.
        copies: `[L, E]` replicas of each expert.
        extra: Replicas to add in each layer; `[L]`, or one number for all.
        heavy: Share of a host's mean load above which a replica should not share its host with another such
            one; once there is one for each host, no more are made.
    """
    copies, layers = copies.copy(), np.arange(len(loads))
    extra = np.broadcast_to(extra, len(loads))
    # Breaks ties, so that experts of equal or no load get replicas evenly.
    weight = loads + np.maximum(loads.mean(axis=1, keepdims=True), 1.0) * 1e-9
    limit = np.inf if heavy is None else heavy * loads.sum(axis=1, keepdims=True) / n_hosts
    for step in range(int(extra.max(initial=0))):
        use = weight / copies
        if heavy is not None:
            taken = np.where(use > limit, copies, 0).sum(axis=1, keepdims=True)
            use = np.where((taken >= n_hosts) & (weight / (copies + 1) > limit), use * 1e-6, use)
        copies[layers, np.where(copies < n_hosts, use, -1.0).argmax(axis=1)] += step < extra
    return copies


def drop_replicas(
    loads: NDArray[np.float64], copies: NDArray[np.int64], least: int, surplus: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`copies` (`[L, E]`) less `surplus` (`[L]`) of them, taken where the load per replica stays lowest."""
    copies, layers = copies.copy(), np.arange(len(loads))
    for step in range(int(surplus.max(initial=0))):
        then = np.where(copies > least, loads / np.maximum(copies - 1, 1), np.inf)
        copies[layers, then.argmin(axis=1)] -= step < surplus
    return copies


def _held(held: Sequence[Sequence[Sequence[int]]], n_experts: int) -> NDArray[np.bool_]:
    """Whether a host holds an expert, `[L, E, H]`."""
    hold = np.zeros((len(held[0]), n_experts, len(held)), dtype=np.bool_)
    for host, rows in enumerate(held):
        for layer, experts in enumerate(rows):
            hold[layer, list(experts), host] = True
    return hold


def _domains(node_of: NDArray[np.int64], n_group: int) -> list[NDArray[np.int64]]:
    """Domains that a group may stay within, each as `[H]` domain of a host, the widest first: node, host."""
    found = []
    if 1 < len(np.unique(node_of)) <= n_group:
        found.append(node_of)
    if len(node_of) <= n_group and len(node_of) > len(np.unique(node_of)):
        found.append(np.arange(len(node_of)))
    return found


def _homes(
    loads: NDArray[np.float64], domain: NDArray[np.int64], n_group: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Assign whole groups to domains, the heaviest first to the domain with the least load for its size.

    Returns:
        `[L, E]` domain of each expert; `[L]` the highest load of a domain for each of its hosts.
    """
    n_layers, n_experts = loads.shape
    hosts = np.bincount(domain)
    heavy = loads.reshape(n_layers, n_group, -1).sum(axis=2)
    home = np.zeros((n_layers, n_group), dtype=np.int64)
    load, count = np.zeros((n_layers, len(hosts))), np.zeros((n_layers, len(hosts)), dtype=np.int64)
    room = np.ceil(n_group * hosts / len(domain))
    layers = np.arange(n_layers)
    for group in np.argsort(-heavy, axis=1, kind="stable").T:
        to = np.where(count < room, load / hosts, np.inf).argmin(axis=1)
        home[layers, group] = to
        load[layers, to] += heavy[layers, group]
        count[layers, to] += 1
    return np.repeat(home, n_experts // n_group, axis=1), (load / hosts).max(axis=1)


def _holders(slots: HostSlots) -> Holders:
    """Holders in the order of replicas, ordered so that the load of primaries is balanced too."""
    hold = slots.hold[:, : slots.n_experts]
    n_layers, n_experts = hold.shape[:2]
    layers = np.arange(n_layers)
    primary = hold.argmax(axis=2)
    single = slots.copies[:, :n_experts] == 1
    load = ((slots.loads * single)[:, None] @ hold)[:, 0]
    order = np.argsort(np.where(single, np.inf, -slots.loads), axis=1, kind="stable")
    for expert in order[:, : int((~single).sum(axis=1).max(initial=0))].T:
        several = ~single[layers, expert]
        to = np.where(hold[layers, expert], load, np.inf).argmin(axis=1)
        primary[layers, expert] = np.where(several, to, primary[layers, expert])
        load[layers, to] += np.where(several, slots.loads[layers, expert], 0.0)
    alone = [(host,) for host in range(hold.shape[2])]
    rows: list[tuple[tuple[int, ...], ...]] = []
    for layer, firsts in enumerate(primary.tolist()):
        row = [alone[host] for host in firsts]
        for expert in np.nonzero(~single[layer])[0].tolist():
            first = firsts[expert]
            others = np.nonzero(hold[layer, expert])[0].tolist()
            row[expert] = (first, *[host for host in others if host != first])
        rows.append(tuple(row))
    return tuple(rows)


__all__ = ["add_replicas", "drop_replicas", "place_by_load"]
