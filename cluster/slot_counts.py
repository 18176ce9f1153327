"""Placement by load: how many replicas each host holds, and which of the held replicas stay.

Shapes: L layers, E experts, H hosts, N nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def slot_counts(
    copies: NDArray[np.int64], nodes: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number of replicas that each host is to hold, `[L, H]`: equal, or one more where most are held now.

    Where the hosts of other nodes are too few for every expert's replicas to span two nodes, they hold more.

    Args:
        copies: `[L, E]` replicas of each expert.
        nodes: `[N, H]` whether a host is on a node.
        counts: `[L, H]` replicas that each host holds now.
    """
    n_layers, n_hosts = counts.shape
    turn = (np.arange(n_hosts)[None, :] - np.arange(n_layers)[:, None]) % n_hosts
    rank = np.argsort(np.argsort(turn - counts * n_hosts, axis=1), axis=1)
    total = copies.sum(axis=1)[:, None]
    slots: NDArray[np.int64] = total // n_hosts + (rank < total % n_hosts)
    if len(nodes) == 1:
        return slots
    size = nodes.sum(axis=1)
    # [L, N]: at least one of an expert's replicas is on another node.
    most = np.minimum(np.maximum(copies - 1, 1)[:, :, None], size).sum(axis=1)
    share = slots @ nodes.T.astype(np.int64)
    for layer in np.nonzero((share > most).any(axis=1))[0].tolist():
        left, rest = int(total[layer, 0]), list(range(len(nodes)))
        while full := [n for n in rest if left * size[n] > most[layer, n] * size[rest].sum()]:
            for node in full:
                _divide(slots[layer], np.nonzero(nodes[node])[0], rank[layer], int(most[layer, node]))
                left -= int(most[layer, node])
                rest.remove(node)
        if rest:
            _divide(slots[layer], np.nonzero(nodes[rest].any(axis=0))[0], rank[layer], left)
    return slots


def _divide(slots: NDArray[np.int64], hosts: NDArray[np.int64], rank: NDArray[np.int64], total: int) -> None:
    """Divide `total` slots among some hosts, evenly; hosts of low rank get the remainder."""
    each, more = divmod(total, len(hosts))
    slots[hosts] = each
    slots[hosts[np.argsort(rank[hosts])[:more]]] += 1


def held_that_stays(
    held: NDArray[np.bool_],
    copies: NDArray[np.int64],
    weight: NDArray[np.float64],
    slots: NDArray[np.int64],
    nodes: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """The held replicas that stay `[L, E, H]`, within each expert's replica count and each host's slots.

    Args:
        held: `[L, E, H]` whether a host holds an expert.
        copies: `[L, E]` replicas of each expert.
        weight: `[L, E]` load of one replica of each expert.
        slots: `[L, H]` slots of each host.
        nodes: `[N, H]` whether a host is on a node.
    """
    held = held.copy()
    load = (weight[:, None] @ held)[:, 0]
    mean = load.mean(axis=1)
    node_of = nodes.argmax(axis=0)

    def drop(layer: int, expert: int, host: int) -> None:
        held[layer, expert, host] = False
        load[layer, host] -= weight[layer, expert]

    near = held @ nodes.T.astype(np.int64)
    many = near.sum(axis=2)
    # All replicas are placed, and all on one of several nodes: one has to move to another node.
    exposed = (len(nodes) > 1) & (copies > 1) & (many >= copies) & (near.max(axis=2) == many)
    for layer, expert in np.argwhere((many > copies) | exposed).tolist():
        hosts: list[int] = np.nonzero(held[layer, expert])[0].tolist()
        while len(hosts) > copies[layer, expert] - exposed[layer, expert]:
            rest = [[other for other in hosts if other != host] for host in hosts]
            spans = [len({int(node_of[other]) for other in others}) > 1 for others in rest]
            loads = [float(load[layer, host]) for host in hosts]
            drop(layer, expert, hosts.pop(max(zip(spans, loads, range(len(hosts)), strict=True))[2]))
    counts = held.sum(axis=1)
    for layer, host in np.argwhere(counts > slots).tolist():
        for _ in range(int(counts[layer, host] - slots[layer, host])):
            experts = np.nonzero(held[layer, :, host])[0]
            after = load[layer, host] - weight[layer, experts]
            drop(layer, int(experts[np.abs(after - mean[layer]).argmin()]), host)
    return held


__all__ = ["held_that_stays", "slot_counts"]
