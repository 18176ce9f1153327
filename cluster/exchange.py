"""Replicas change places until the highest load of the hosts falls no more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.shelves import Shelves

_SMALL = 1e-6  # a gain that is worth a move, as a share of the mean load
_CELLS = 12_000  # pairs that a round looks at, over all layers


def exchange(shelves: Shelves, target: NDArray[np.float64]) -> None:
    """Exchange replicas between each layer's busiest host and idle ones, the best pair of each round.

    A vacant slot counts as a replica without load. Layers are done when their highest load is at most
    `target` (`[L]`), or when no exchange with the hosts that are looked at lowers it.
    """
    n_hosts, slots = shelves.at.shape[1:]
    if n_hosts < 2:
        return
    layers = np.nonzero(shelves.load.max(axis=1) > np.maximum(target, 0.0))[0]
    for _ in range(4 * n_hosts + slots):
        if not len(layers):
            return
        partners = min(n_hosts - 1, max(1, _CELLS // (len(layers) * slots * slots)))
        load = shelves.load[layers]
        idle = np.argpartition(load, partners - 1, axis=1)[:, :partners]
        busy = np.repeat(load.argmax(axis=1)[:, None], partners, axis=1)
        gain, give, take = _best_exchange(shelves, layers, busy, idle)
        best = (np.arange(len(layers)), gain.argmax(axis=1))
        gained = gain[best] > _SMALL * load.mean(axis=1)
        _swap(
            shelves,
            layers[gained],
            (busy[best][gained], give[best][gained]),
            (idle[best][gained], take[best][gained]),
        )
        layers = layers[gained & (shelves.load[layers].max(axis=1) > target[layers])]


def level(shelves: Shelves, rounds: int) -> None:
    """Exchange between all hosts at once, the busiest with the idlest, the next with the next."""
    n_layers, n_hosts, _ = shelves.at.shape
    half = n_hosts // 2
    if not half:
        return
    layers = np.arange(n_layers)
    small = _SMALL * shelves.load.mean(axis=1, keepdims=True)
    for turn in range(rounds):
        order = np.argsort(shelves.load, axis=1, kind="stable")
        busy, idle = order[:, ::-1][:, :half], np.roll(order[:, :half], -turn, axis=1)
        gain, give, take = _best_exchange(shelves, layers, busy, idle)
        row, pair = np.nonzero(gain > small)
        if not len(row):
            return
        one, other = (busy[row, pair], give[row, pair]), (idle[row, pair], take[row, pair])
        # The rules were looked at for each pair alone: an expert may move once.
        named = np.concatenate([shelves.at[row, *one], shelves.at[row, *other]]) + np.tile(row, 2) * (1 << 32)
        _, first, back = np.unique(named, return_index=True, return_inverse=True)
        new = (first[back] == np.arange(len(named))).reshape(2, -1).all(axis=0)
        _swap(shelves, row[new], (one[0][new], one[1][new]), (other[0][new], other[1][new]))


def _best_exchange(
    shelves: Shelves, layers: NDArray[np.int64], busy: NDArray[np.int64], idle: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """The best exchange of each pair of hosts (`busy`, `idle`: `[A, P]`, of A layers).

    Returns:
        `[A, P]` by how much the higher load of both falls, 0 or less for no exchange; the slots.
    """
    a, b, load = shelves.at[layers[:, None], busy], shelves.at[layers[:, None], idle], shelves.load
    gap = load[layers[:, None], busy] - load[layers[:, None], idle]
    rows = layers[:, None, None] * shelves.hold.shape[1]
    given, taken = rows + a, rows + b  # [A, P, K] into [L · (E + 2)]
    weight = shelves.weight.reshape(-1)
    fits = ~_holds(shelves, given, idle) & _spans(shelves, given, busy, idle)
    returns = ~_holds(shelves, taken, busy) & _spans(shelves, taken, idle, busy)
    # Infinities keep what may not move out of every exchange.
    heavy = np.where(fits, weight[given], np.inf)[:, :, :, None]
    light = np.where(returns, weight[taken], -np.inf)[:, :, None, :]
    less = heavy - light  # [A, P, K, K]
    np.minimum(less, gap[:, :, None, None] - less, out=less)
    flat = less.reshape(*less.shape[:2], -1)
    best = flat.argmax(axis=2)
    give, take = np.divmod(best, less.shape[3])
    return np.take_along_axis(flat, best[:, :, None], axis=2)[:, :, 0], give, take


def _holds(shelves: Shelves, experts: NDArray[np.int64], host: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`[A, P, K]` whether the host (`[A, P]`) holds these."""
    found: NDArray[np.bool_] = shelves.hold.reshape(-1).take(
        experts * shelves.hold.shape[2] + host[:, :, None]
    )
    return found


def _spans(
    shelves: Shelves, experts: NDArray[np.int64], source: NDArray[np.int64], to: NDArray[np.int64]
) -> NDArray[np.bool_] | bool:
    """Whether replicas still lie on two nodes when these (`[A, P, K]`) go from one host to another."""
    n_nodes = shelves.near.shape[2]
    if n_nodes == 1:
        return True
    there = shelves.node_of[to][:, :, None]
    others = shelves.copies.reshape(-1).take(experts) - 1
    near = shelves.near.reshape(-1).take(experts * n_nodes + there)
    found: NDArray[np.bool_] = (others == 0) | (
        near - (there == shelves.node_of[source][:, :, None]) < others
    )
    return found


def _swap(
    shelves: Shelves,
    layer: NDArray[np.int64],
    one: tuple[NDArray[np.int64], NDArray[np.int64]],
    other: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Exchange what lies in two slots (host, slot) of each of some layers."""
    first, second = shelves.at[layer, *one], shelves.at[layer, *other]
    for expert, (source, _), (to, slot) in ((first, one, other), (second, other, one)):
        shelves.at[layer, to, slot] = expert
        shelves.hold[layer, expert, source] = False
        shelves.hold[layer, expert, to] = True
        shelves.near[layer, expert, shelves.node_of[source]] -= 1
        shelves.near[layer, expert, shelves.node_of[to]] += 1
        moved = shelves.weight[layer, expert]
        shelves.load[layer, source] -= moved
        shelves.load[layer, to] += moved


__all__ = ["exchange", "level"]
