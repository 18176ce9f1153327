"""Placement by load, layer by layer: filling hosts with replicas of experts, and exchanging them.

Shapes: L layers, E experts, H hosts, N nodes, K slots of the largest host; see `cluster.shelves` for what
`at`, `hold`, `near`, `load`, `count`, `room`, `weight` and `copies` are.
"""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled

_NODE = 1e-6  # of a node's load: decides between equal hosts, so that its others stay open


@compiled
def fill_layer(first, steps, at, hold, near, load, count, room, weight, copies, node_of, home, domain):
    """Put the experts `steps[first:]` on the hosts with the least load, one replica each, as the rules allow.

    Args (of one layer):
        steps: [S] int64, an expert as often as it lacks replicas.
        at, hold, near, load, count: changed in place.
        home, domain: [E] and [H] int64: where an expert's first replica should be, the next in the next
            domain; of length 0 for no such wish.

    Returns:
        The position of a replica that no host with room may take; S when all are placed.
    """
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
            if count[host] >= room[host] or hold[expert, host]:
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
        at[best, count[best]] = expert
        count[best] += 1
        hold[expert, best] = True
        near[expert, node_of[best]] += 1
        load[best] += weight[expert]
        node_load[node_of[best]] += weight[expert]
    return len(steps)


@compiled
def _spans(near, copies, node_of, expert, source, to):
    """Whether an expert's replicas still lie on two nodes when one of them goes from a host to another."""
    if near.shape[1] == 1 or copies[expert] == 1:
        return True
    there = node_of[to]
    return near[expert, there] - (1 if node_of[source] == there else 0) < copies[expert] - 1


@compiled
def _best_exchange(at, hold, near, load, weight, copies, node_of, busy, idle, gain):
    """The exchange of two hosts by which the higher load of both falls most, by more than `gain`.

    Returns:
        By how much, and the slots; `gain` and -1 where there is none.
    """
    give, take = -1, -1
    gap = load[busy] - load[idle]
    for i in range(at.shape[1]):
        one = at[busy, i]
        if hold[one, idle] or not _spans(near, copies, node_of, one, busy, idle):
            continue
        for j in range(at.shape[1]):
            less = weight[one] - weight[at[idle, j]]
            falls = min(less, gap - less)
            if falls > gain:
                other = at[idle, j]
                if not hold[other, busy] and _spans(near, copies, node_of, other, idle, busy):
                    gain, give, take = falls, i, j
    return gain, give, take


@compiled
def _swap(at, hold, near, load, weight, node_of, busy, give, idle, take):
    one, other = at[busy, give], at[idle, take]
    at[busy, give], at[idle, take] = other, one
    hold[one, busy], hold[one, idle] = False, True
    hold[other, idle], hold[other, busy] = False, True
    source, to = node_of[busy], node_of[idle]
    near[one, source] -= 1
    near[one, to] += 1
    near[other, to] -= 1
    near[other, source] += 1
    load[busy] += weight[other] - weight[one]
    load[idle] += weight[one] - weight[other]


@compiled
def exchange(at, hold, near, load, weight, copies, node_of, target, small):
    """Exchange replicas of each layer's busiest host until the highest load falls no more.

    A vacant slot counts as a replica without load.

    Args:
        at, hold, near, load: [L, …], changed in place.
        target: [L], a layer whose highest load is at most this is done.
        small: a gain that is worth a move, as a share of the mean load.
    """
    n_layers, n_hosts = load.shape
    for layer in range(n_layers):
        least = small * load[layer].mean()
        for _ in range(4 * n_hosts + at.shape[2]):
            order = np.argsort(load[layer])
            busy = order[n_hosts - 1]
            if load[layer, busy] <= target[layer]:
                break
            gain, give, take, to = least, -1, -1, -1
            for rank in range(n_hosts - 1):
                idle = order[rank]
                if (load[layer, busy] - load[layer, idle]) / 2 <= gain:
                    break  # no exchange with this one or the others can be better
                found = _best_exchange(
                    at[layer], hold[layer], near[layer], load[layer], weight[layer], copies[layer],
                    node_of, busy, idle, gain,
                )  # fmt: skip
                if found[1] >= 0:
                    gain, give, take = found
                    to = idle
            if to < 0:
                break
            _swap(
                at[layer], hold[layer], near[layer], load[layer], weight[layer],
                node_of, busy, give, to, take,
            )  # fmt: skip


@compiled
def level(at, hold, near, load, weight, copies, node_of, rounds, small):
    """Exchange between all hosts, the busiest with the idlest, and so on; each time in other pairs."""
    n_layers, n_hosts = load.shape
    half = n_hosts // 2
    for layer in range(n_layers):
        least = small * load[layer].mean()
        for turn in range(rounds):
            order = np.argsort(load[layer])
            moved = False
            for rank in range(half):
                busy, idle = order[n_hosts - 1 - rank], order[(rank - turn) % half]
                _, give, take = _best_exchange(
                    at[layer], hold[layer], near[layer], load[layer], weight[layer], copies[layer],
                    node_of, busy, idle, least,
                )  # fmt: skip
                if give >= 0:
                    moved = True
                    _swap(
                        at[layer], hold[layer], near[layer], load[layer], weight[layer],
                        node_of, busy, give, idle, take,
                    )  # fmt: skip
            if not moved:
                break


__all__ = ["exchange", "fill_layer", "level"]
