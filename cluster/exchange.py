"""Replicas change places until the highest load of the hosts falls no more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.shelves import Shelves

_SMALL = 1e-6  # a gain that is worth a move, as a share of the mean load
_CELLS = 30_000  # pairs that a round looks at, over all layers


def exchange(shelves: Shelves, target: NDArray[np.float64]) -> None:
    """Exchange replicas between each layer's busiest host and idle ones, the best pair of each round.

    A vacant slot counts as a replica without load. Layers are done when their highest load is at most
    `target` (`[L]`), or when no exchange with the hosts that are looked at lowers it.
    """
    n_hosts, slots = shelves.at.shape[1:]
    if n_hosts < 2:
        return
    small = _SMALL * shelves.load.mean(axis=1)
    rounds = 4 * n_hosts + slots
    active = np.nonzero(shelves.load.max(axis=1) > np.maximum(target, small))[0]
    for _ in range(rounds):
        if not len(active):
            return
        partners = min(n_hosts - 1, max(1, _CELLS // (len(active) * slots * slots)))
        gained = _round(shelves, active, partners, small[active])
        active = active[gained & (shelves.load[active].max(axis=1) > target[active])]


def _round(
    shelves: Shelves, layers: NDArray[np.int64], partners: int, small: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The best exchange of each layer (A of them); whether there was one. P partners, K slots."""
    at, hold, near = shelves.at, shelves.hold, shelves.near
    node_of, load = shelves.node_of, shelves.load[layers]
    busy = load.argmax(axis=1)  # [A]
    idle = np.argsort(load, axis=1, kind="stable")[:, :partners]  # [A, P]
    row, rows = layers[:, None], layers[:, None, None]
    gives, takes = at[layers, busy], at[row, idle]  # [A, K], [A, P, K]
    gap = load.max(axis=1)[:, None] - np.take_along_axis(load, idle, axis=1)
    less = shelves.weight[row, gives][:, None, :, None] - shelves.weight[rows, takes][:, :, None, :]
    gain = np.minimum(
        less, gap[:, :, None, None] - less
    )  # [A, P, K, K]: by how much the higher of both falls
    fits = ~hold[rows, gives[:, None, :], idle[:, :, None]]  # [A, P, K]
    returns = ~hold[rows, takes, busy[:, None, None]]
    if near.shape[2] > 1:
        there, here = node_of[idle], node_of[busy]
        same = (there == here[:, None])[:, :, None]
        # Of the other replicas one at least must lie on another node than the new host.
        others = shelves.copies[row, gives][:, None, :] - 1
        fits &= (others == 0) | (near[rows, gives[:, None, :], there[:, :, None]] - same < others)
        others = shelves.copies[rows, takes] - 1
        returns &= (others == 0) | (near[rows, takes, here[:, None, None]] - same < others)
    gain = np.where(fits[:, :, :, None] & returns[:, :, None, :], gain, -1.0)
    flat = gain.reshape(len(layers), -1)
    best = flat.argmax(axis=1)
    gained: NDArray[np.bool_] = flat[np.arange(len(layers)), best] > small
    which = np.nonzero(gained)[0]
    partner, give, take = (index[which] for index in np.unravel_index(best, gain.shape[1:]))
    layer, busy, idle = layers[which], busy[which], idle[which, partner]
    _swap(shelves, layer, (busy, give), (idle, take))
    return gained


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


__all__ = ["exchange"]
