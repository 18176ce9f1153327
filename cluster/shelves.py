"""Hosts as shelves with so many slots each, filled with replicas of experts by load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.rooms import keep, rooms
from kernels import placing

_SMALL = 1e-4  # a gain that is worth a move, as a share of the mean load
_HANDS = 2  # replicas that are handed on to make room for one


class Shelves:
    """What every host holds in every layer, and what may be put where.

    L layers, E experts, H hosts, N nodes, K slots of the largest host. A vacant slot holds the pseudo-expert
    E, of which a host has at most one, like of any expert; a slot that is not there holds E + 1.

    Attributes:
        loads: `[L, E]`.
        copies: `[L, E + 2]` replicas of each expert (of a pseudo-expert 1); `weight`: load of one of them.
        at: `[L, H, K]` expert in each slot.
        hold: `[L, E + 2, H]` who holds what.
        near: `[L, E + 2, N]` replicas on each node.
        load: `[L, H]`.
    """

    def __init__(
        self,
        loads: NDArray[np.float64],
        copies: NDArray[np.int64],
        node_of: NDArray[np.int64],
        held: NDArray[np.bool_] | None = None,
    ) -> None:
        n_layers, self.n_experts = loads.shape
        n_hosts, n_nodes = len(node_of), int(node_of.max()) + 1
        self.loads, self.node_of = loads, node_of
        self.nodes = node_of[None, :] == np.arange(n_nodes)[:, None]
        pseudo = np.ones((n_layers, 2), dtype=np.int64)
        self.copies = np.concatenate([copies, pseudo], axis=1)
        self.weight = np.concatenate([loads / copies, 0.0 * pseudo], axis=1)
        self.hold = np.zeros((n_layers, self.n_experts + 2, n_hosts), dtype=np.bool_)
        self.hold[:, -1] = True
        self.near = np.zeros((n_layers, self.n_experts + 2, n_nodes), dtype=np.int64)
        self.load = np.zeros((n_layers, n_hosts))
        self.count = np.zeros((n_layers, n_hosts), dtype=np.int64)
        counts = np.zeros((n_layers, n_hosts), dtype=np.int64) if held is None else held.sum(axis=1)
        self.room = rooms(copies, self.nodes, counts)
        slots = int(self.room.max())
        self.at = np.full((n_layers, n_hosts, slots), self.n_experts + 1, dtype=np.int64)
        missing = slots - self.room
        most = missing.max(axis=1, keepdims=True)
        self.vacant = np.logical_and(most <= 1, missing > 0)
        if held is not None:
            weight = self.weight[:, : self.n_experts]
            self._begin_with(keep(held, copies, weight, self.room, self.nodes))

    def _begin_with(self, held: NDArray[np.bool_]) -> None:
        """Put what is held (`[L, E, H]`) into the first slots."""
        layers, experts, hosts = np.nonzero(held)
        for layer, expert, host in zip(layers.tolist(), experts.tolist(), hosts.tolist(), strict=True):
            self.at[layer, host, self.count[layer, host]] = expert
            self.count[layer, host] += 1
        self.hold[:, : self.n_experts] = held
        self.near[:, : self.n_experts] = held @ self.nodes.T.astype(np.int64)
        self.load = (self.weight[:, None, : self.n_experts] @ held)[:, 0]

    def take_over(self, layers: NDArray[np.int64], other: Shelves, which: NDArray[Any]) -> None:
        """Replace some layers by those of `other`; what lies in which slot is not kept up."""
        for name in ("hold", "load", "copies", "weight"):
            getattr(self, name)[layers] = getattr(other, name)[which]

    def fill(self, homes: NDArray[np.int64] | None = None, domain: NDArray[np.int64] | None = None) -> None:
        """Put what is missing on the hosts with the least load, the heaviest first.

        Args:
            homes: `[L, E]` domain that the first replica should stay in; the next prefers the next domain.
            domain: `[H]` of each host.
        """
        n_experts = self.n_experts
        lacking = self.copies[:, :n_experts] - self.hold[:, :n_experts].sum(axis=2)
        order = np.argsort(-self.weight[:, :n_experts], axis=1, kind="stable")
        lacking = np.take_along_axis(lacking, order, axis=1)
        nowhere = np.zeros(0, dtype=np.int64)
        for layer in range(len(order)):
            steps = np.repeat(order[layer], lacking[layer])
            home = nowhere if homes is None else homes[layer]
            at = 0
            while at < len(steps):
                at = placing.fill_layer(
                    at,
                    steps,
                    *(array[layer] for array in (self.at, self.hold, self.near, self.load, self.count)),
                    *(array[layer] for array in (self.room, self.weight, self.copies)),
                    self.node_of,
                    home,
                    nowhere if domain is None else domain,
                )
                if at < len(steps):
                    self._squeeze(layer, int(steps[at]))
                    at += 1
        for layer, host in zip(*np.nonzero(self.vacant), strict=True):
            self.at[layer, host, -1] = n_experts
            self.hold[layer, n_experts, host] = True

    def exchange(self, target: NDArray[np.float64]) -> None:
        """Exchange replicas between each layer's busiest host and others until its load falls no more.

        Args:
            target: `[L]`, a highest load that is low enough.
        """
        placing.exchange(*self._arrays(), target, _SMALL)

    def level(self, rounds: int) -> None:
        """Exchange between all hosts, the busiest with the idlest, the next with the next."""
        placing.level(*self._arrays(), rounds, _SMALL)

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.at, self.hold, self.near, self.load, self.weight, self.copies, self.node_of

    def _put(self, layer: int, expert: int, host: int) -> None:
        """Put a replica into a free slot."""
        self.at[layer, host, self.count[layer, host]] = expert
        self.count[layer, host] += 1
        self.hold[layer, expert, host] = True
        self.near[layer, expert, self.node_of[host]] += 1
        self.load[layer, host] += self.weight[layer, expert]

    def _take(self, layer: int, host: int, expert: int) -> None:
        """Take a replica away; the last slot's fills the gap."""
        last = int(self.count[layer, host]) - 1
        slot = self.at[layer, host, : last + 1].tolist().index(expert)
        self.at[layer, host, slot] = self.at[layer, host, last]
        self.at[layer, host, last] = self.n_experts + 1
        self.count[layer, host] = last
        self.hold[layer, expert, host] = False
        self.near[layer, expert, self.node_of[host]] -= 1
        self.load[layer, host] -= self.weight[layer, expert]

    def _takers(self, layer: int, expert: int) -> NDArray[np.int64]:
        """Hosts that may take a replica, if they have room."""
        near = self.near[layer, expert]
        found = ~self.hold[layer, expert]
        placed = int(near.sum())
        if len(near) > 1 and placed and self.copies[layer, expert] > 1:
            found &= near[self.node_of] != placed
        return np.nonzero(found)[0]

    def _squeeze(self, layer: int, expert: int) -> None:
        """Place a replica that no host with room may take: on one that hands something on to such a host."""
        if any(self._hand_on(layer, expert, hands) for hands in range(1, _HANDS + 1)):
            return
        # The rules leave no other way: one host holds one expert more.
        takers = self._takers(layer, expert)
        host = int(takers[(self.count[layer, takers] - self.room[layer, takers]).argmin()])
        if self.count[layer, host] == self.at.shape[2]:
            more = np.full((*self.at.shape[:2], 1), self.n_experts + 1, dtype=np.int64)
            self.at = np.concatenate([self.at, more], axis=2)
        self.vacant[layer] = False
        self._put(layer, expert, host)

    def _hand_on(self, layer: int, expert: int, hands: int) -> bool:
        """Place a replica; whether that can be done with so many replicas that move on from host to host."""
        takers = self._takers(layer, expert)
        if not hands:
            takers = takers[self.count[layer, takers] < self.room[layer, takers]]
        for host in takers[np.argsort(self.load[layer, takers], kind="stable")].tolist():
            if not hands:
                self._put(layer, expert, host)
                return True
            for other in self.at[layer, host, : self.count[layer, host]].tolist():
                self._take(layer, host, other)
                self._put(layer, expert, host)  # first, so that the other one finds no room here
                if self._hand_on(layer, other, hands - 1):
                    return True
                self._take(layer, host, expert)
                self._put(layer, other, host)
        return False


__all__ = ["Shelves"]
