"""Placement by load, layer by layer: filling hosts with replicas of experts, and exchanging them.

Shapes: L layers, E experts, H hosts, N nodes, K slots of the largest host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.compiled import compiled

_NODE = 1e-6  # share of a node's load that decides between hosts of equal load


class Slots(NamedTuple):
    """Slots of all hosts in all layers, changed in place; the same without the axis L for one layer.

    Attributes:
        at: `[L, H, K]` int64, expert in each slot.
        hold: `[L, E + 2, H]` bool, whether a host holds an expert.
        near: `[L, E + 2, N]` int64, replicas of each expert on each node.
        load: `[L, H]` float64, load of each host.
        used: `[L, H]` int64, occupied slots of each host.
        room: `[L, H]` int64, slots of each host.
        weight: `[L, E + 2]` float64, load of one replica of each expert.
        copies: `[L, E + 2]` int64, replicas of each expert.
        node_of: `[H]` int64, node of each host.
    """

    at: NDArray[np.int64]
    hold: NDArray[np.bool_]
    near: NDArray[np.int64]
    load: NDArray[np.float64]
    used: NDArray[np.int64]
    room: NDArray[np.int64]
    weight: NDArray[np.float64]
    copies: NDArray[np.int64]
    node_of: NDArray[np.int64]


@compiled
def _layer(slots, layer):
    """The slots of one layer."""
    return Slots(
        slots.at[layer], slots.hold[layer], slots.near[layer], slots.load[layer], slots.used[layer],
        slots.room[layer], slots.weight[layer], slots.copies[layer], slots.node_of,
    )  # fmt: skip


@compiled
def fill_layer(first, steps, slots, home, domain):
    """Put the experts `steps[first:]` on the hosts with the least load, one replica each, as the rules allow.

    Args:
        first: Index of the first replica to place.
        steps: `[S]` int64, an expert as often as it lacks replicas.
        slots: Slots of one layer.
        home: `[E]` int64, preferred domain of an expert's first replica; the next prefers the next domain. Of
            length 0 without preferences.
        domain: `[H]` int64, domain of each host; of length 0 without preferences.

    Returns:
        Index of a replica that no host with a free slot may take; S when all are placed.
    """
    at, hold, near, load, used, room, weight, copies, node_of = slots
    n_hosts, n_nodes = len(load), near.shape[1]
    n_domains = domain.max() + 1 if len(domain) else 0
    node_load = np.zeros(n_nodes)
    for host in range(n_hosts):
        node_load[node_of[host]] += load[host]
    for step in range(first, len(steps)):
        expert = steps[step]
        several = copies[expert] > 1
        placed = near[expert].sum()
        wanted = (home[expert] + placed) % n_domains if n_domains else 0
        best, best_away, best_cost = -1, False, 0.0
        for host in range(n_hosts):
            if used[host] >= room[host] or hold[expert, host]:
                continue
            node = node_of[host]
            if several and n_nodes > 1 and placed > 0 and near[expert, node] == placed:
                continue
            cost = load[host] + (_NODE * node_load[node] if several else 0.0)
            away = n_domains > 0 and domain[host] != wanted
            if best < 0 or (away, cost) < (best_away, best_cost):
                best, best_away, best_cost = host, away, cost
        if best < 0:
            return step
        at[best, used[best]] = expert
        used[best] += 1
        hold[expert, best] = True
        near[expert, node_of[best]] += 1
        load[best] += weight[expert]
        node_load[node_of[best]] += weight[expert]
    return len(steps)


@compiled
def _spans(slots, expert, source, to):
    """Whether an expert's replicas are still on two nodes after one has moved from a host to another."""
    near, copies, node_of = slots.near, slots.copies, slots.node_of
    if near.shape[1] == 1 or copies[expert] == 1:
        return True
    there = node_of[to]
    return near[expert, there] - (1 if node_of[source] == there else 0) < copies[expert] - 1


@compiled
def _best_exchange(slots, busy, idle, gain):
    """The exchange of two hosts that lowers the higher load of both most, by more than `gain`.

    Returns:
        The gain and the two slots; the given `gain` and -1, -1 if no exchange gains more.
    """
    at, hold, load, weight = slots.at, slots.hold, slots.load, slots.weight
    give, take = -1, -1
    gap = load[busy] - load[idle]
    for i in range(at.shape[1]):
        one = at[busy, i]
        if hold[one, idle] or not _spans(slots, one, busy, idle):
            continue
        for j in range(at.shape[1]):
            less = weight[one] - weight[at[idle, j]]
            falls = min(less, gap - less)
            if falls > gain:
                other = at[idle, j]
                if not hold[other, busy] and _spans(slots, other, idle, busy):
                    gain, give, take = falls, i, j
    return gain, give, take


@compiled
def _swap(slots, busy, give, idle, take):
    """Exchange the replica in slot `give` of one host with the one in slot `take` of another."""
    at, hold, near, load, weight = slots.at, slots.hold, slots.near, slots.load, slots.weight
    one, other = at[busy, give], at[idle, take]
    at[busy, give], at[idle, take] = other, one
    hold[one, busy], hold[one, idle] = False, True
    hold[other, idle], hold[other, busy] = False, True
    source, to = slots.node_of[busy], slots.node_of[idle]
    near[one, source] -= 1
    near[one, to] += 1
    near[other, to] -= 1
    near[other, source] += 1
    load[busy] += weight[other] - weight[one]
    load[idle] += weight[one] - weight[other]


@compiled
def exchange(slots, target, small):
    """Exchange replicas of each layer's busiest host until the highest load falls no more.

    A vacant slot counts as a replica without load.

    Args:
        slots: Slots of all layers.
        target: `[L]` float64; a layer is done when its highest load is at most this.
        small: Least gain of an exchange, as a share of the mean load.
    """
    n_layers, n_hosts = slots.load.shape
    for layer in range(n_layers):
        one = _layer(slots, layer)
        load = one.load
        least = small * load.mean()
        for _ in range(4 * n_hosts + one.at.shape[1]):
            order = np.argsort(load)
            busy = order[n_hosts - 1]
            if load[busy] <= target[layer]:
                break
            gain, give, take, to = least, -1, -1, -1
            for rank in range(n_hosts - 1):
                idle = order[rank]
                if (load[busy] - load[idle]) / 2 <= gain:
                    break  # no exchange with this host or the others can be better
                found = _best_exchange(one, busy, idle, gain)
                if found[1] >= 0:
                    gain, give, take = found
                    to = idle
            if to < 0:
                break
            _swap(one, busy, give, to, take)


@compiled
def level(slots, rounds, small):
    """Exchange replicas between all hosts in pairs: busiest and idlest, and so on; each round in other pairs.

    Args:
        slots: Slots of all layers.
        rounds: Rounds at most.
        small: Least gain of an exchange, as a share of the mean load.
    """
    n_layers, n_hosts = slots.load.shape
    half = n_hosts // 2
    for layer in range(n_layers):
        one = _layer(slots, layer)
        least = small * one.load.mean()
        for turn in range(rounds):
            order = np.argsort(one.load)
            moved = False
            for rank in range(half):
                busy, idle = order[n_hosts - 1 - rank], order[(rank - turn) % half]
                _, give, take = _best_exchange(one, busy, idle, least)
                if give >= 0:
                    moved = True
                    _swap(one, busy, give, idle, take)
            if not moved:
                break


__all__ = ["Slots", "exchange", "fill_layer", "level"]
