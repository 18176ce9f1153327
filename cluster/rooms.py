"""How many experts each host is to hold when placed by load, and what it keeps of what it holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rooms(
    copies: NDArray[np.int64], nodes: NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`[L, H]` replicas that each host is to hold: equally many, or one more where most are held.

    Where so few hosts are on other nodes that the replicas could not span two of them, these hold more.
    """
    n_layers, n_hosts = counts.shape
    turn = (np.arange(n_hosts)[None, :] - np.arange(n_layers)[:, None]) % n_hosts
    rank = np.argsort(np.argsort(turn - counts * n_hosts, axis=1), axis=1)
    total = copies.sum(axis=1)[:, None]
    room: NDArray[np.int64] = total // n_hosts + (rank < total % n_hosts)
    if len(nodes) == 1:
        return room
    size = nodes.sum(axis=1)
    # [L, N]: of an expert's replicas one at least lies elsewhere.
    most = np.minimum(np.maximum(copies - 1, 1)[:, :, None], size).sum(axis=1)
    share = room @ nodes.T.astype(np.int64)
    for layer in np.nonzero((share > most).any(axis=1))[0].tolist():
        left, rest = int(total[layer, 0]), list(range(len(nodes)))
        while full := [n for n in rest if left * size[n] > most[layer, n] * size[rest].sum()]:
            for node in full:
                _deal(room[layer], np.nonzero(nodes[node])[0], rank[layer], int(most[layer, node]))
                left -= int(most[layer, node])
                rest.remove(node)
        if rest:
            _deal(room[layer], np.nonzero(nodes[rest].any(axis=0))[0], rank[layer], left)
    return room


def _deal(room: NDArray[np.int64], hosts: NDArray[np.int64], rank: NDArray[np.int64], total: int) -> None:
    """Give some hosts `total` slots between them."""
    each, more = divmod(total, len(hosts))
    room[hosts] = each
    room[hosts[np.argsort(rank[hosts])[:more]]] += 1


def keep(
    held: NDArray[np.bool_],
    copies: NDArray[np.int64],
    weight: NDArray[np.float64],
    room: NDArray[np.int64],
    nodes: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """`[L, E, H]` what stays of `held`: no more replicas than there should be, nor than a host has room for.

    Args:
        held: `[L, E, H]` who holds what.
        copies, weight: `[L, E]` replicas, and the load of one of them.
        room: `[L, H]`.
        nodes: `[N, H]` which hosts are on which node.
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
    # All there, and all on one of several nodes: one has to go to another.
    exposed = (len(nodes) > 1) & (copies > 1) & (many >= copies) & (near.max(axis=2) == many)
    for layer, expert in np.argwhere((many > copies) | exposed).tolist():
        hosts: list[int] = np.nonzero(held[layer, expert])[0].tolist()
        while len(hosts) > copies[layer, expert] - exposed[layer, expert]:
            rest = [[other for other in hosts if other != host] for host in hosts]
            spans = [len({int(node_of[other]) for other in others}) > 1 for others in rest]
            loads = [float(load[layer, host]) for host in hosts]
            drop(layer, expert, hosts.pop(max(zip(spans, loads, range(len(hosts)), strict=True))[2]))
    counts = held.sum(axis=1)
    for layer, host in np.argwhere(counts > room).tolist():
        for _ in range(int(counts[layer, host] - room[layer, host])):
            experts = np.nonzero(held[layer, :, host])[0]
            after = load[layer, host] - weight[layer, experts]
            drop(layer, int(experts[np.abs(after - mean[layer]).argmin()]), host)
    return held


__all__ = ["keep", "rooms"]
