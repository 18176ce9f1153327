"""Placement by load: the slots of all hosts in all layers, and how replicas of experts are put into them.

Shapes: L layers, E experts, H hosts, N nodes, K slots of the largest host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.slot_counts import held_that_stays, slot_counts
from kernels import placing

_SMALL = 1e-4  # least gain of an exchange, as a share of the mean load
_HANDS = 2  # replicas that may move on to other hosts to make room for one


class HostSlots:
    """The replicas that every host holds in every layer.

    A vacant slot holds the pseudo-expert E, of which a host has at most one, as of any expert; a slot that
    does not exist holds E + 1.

    Args:
        loads: `[L, E]` load of each expert.
        copies: `[L, E]` replicas of each expert.
        node_of: `[H]` node of each host.
        held: `[L, E, H]` whether a host holds an expert now; None if hosts hold nothing.

    Attributes:
        loads: `[L, E]` load of each expert.
        copies: `[L, E + 2]` replicas of each expert; 1 for a pseudo-expert.
        weight: `[L, E + 2]` load of one replica of each expert.
        at: `[L, H, K]` expert in each slot.
        hold: `[L, E + 2, H]` whether a host holds an expert.
        near: `[L, E + 2, N]` replicas of each expert on each node.
        load: `[L, H]` load of each host.
        used: `[L, H]` occupied slots of each host.
        room: `[L, H]` slots of each host.
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
        self.used = np.zeros((n_layers, n_hosts), dtype=np.int64)
        counts = np.zeros((n_layers, n_hosts), dtype=np.int64) if held is None else held.sum(axis=1)
        self.room = slot_counts(copies, self.nodes, counts)
        slots = int(self.room.max())
        self.at = np.full((n_layers, n_hosts, slots), self.n_experts + 1, dtype=np.int64)
        missing = slots - self.room
        most = missing.max(axis=1, keepdims=True)
        self.vacant = np.logical_and(most <= 1, missing > 0)
        if held is not None:
            weight = self.weight[:, : self.n_experts]
            self._begin_with(held_that_stays(held, copies, weight, self.room, self.nodes))

    def _begin_with(self, held: NDArray[np.bool_]) -> None:
        """Put the replicas that stay (`[L, E, H]`) into the first slots."""
        layers, experts, hosts = np.nonzero(held)
        for layer, expert, host in zip(layers.tolist(), experts.tolist(), hosts.tolist(), strict=True):
            self.at[layer, host, self.used[layer, host]] = expert
            self.used[layer, host] += 1
        self.hold[:, : self.n_experts] = held
        self.near[:, : self.n_experts] = held @ self.nodes.T.astype(np.int64)
        self.load = (self.weight[:, None, : self.n_experts] @ held)[:, 0]

    def take_over(self, layers: NDArray[np.int64], other: HostSlots, which: NDArray[Any]) -> None:
        """Replace some layers by layers of `other`; `at`, `near`, `used` and `room` become stale there.

        Args:
            layers: Indices of the layers to replace.
            other: Where the new layers come from.
            which: Indices of the layers of `other`.
        """
        for name in ("hold", "load", "copies", "weight"):
            getattr(self, name)[layers] = getattr(other, name)[which]

    def fill(self, homes: NDArray[np.int64] | None = None, domain: NDArray[np.int64] | None = None) -> None:
        """Put missing replicas on the hosts with the least load, the heaviest replica first.

        Args:
            homes: `[L, E]` preferred domain of an expert's first replica; the next prefers the next domain.
            domain: `[H]` domain of each host.
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
                slots = self._layer(layer)
                at = placing.fill_layer(at, steps, slots, home, nowhere if domain is None else domain)
                if at < len(steps):
                    self._squeeze_in(layer, int(steps[at]))
                    at += 1
        for layer, host in zip(*np.nonzero(self.vacant), strict=True):
            self.at[layer, host, -1] = n_experts
            self.hold[layer, n_experts, host] = True

    def exchange(self, target: NDArray[np.float64]) -> None:
        """Exchange replicas between each layer's busiest host and others until its load falls no more.

        Args:
            target: `[L]` highest load of a host that is low enough.
        """
        placing.exchange(self._all_layers(), target, _SMALL)

    def level(self, rounds: int) -> None:
        """Exchange replicas between paired hosts.

        The busiest is paired with the idlest, the second busiest with the second idlest, and so on.
        """
        placing.level(self._all_layers(), rounds, _SMALL)

    def _all_layers(self) -> placing.Slots:
        return placing.Slots(
            at=self.at,
            hold=self.hold,
            near=self.near,
            load=self.load,
            used=self.used,
            room=self.room,
            weight=self.weight,
            copies=self.copies,
            node_of=self.node_of,
        )

    def _layer(self, layer: int) -> placing.Slots:
        return placing.Slots(
            at=self.at[layer],
            hold=self.hold[layer],
            near=self.near[layer],
            load=self.load[layer],
            used=self.used[layer],
            room=self.room[layer],
            weight=self.weight[layer],
            copies=self.copies[layer],
            node_of=self.node_of,
        )

    def _put(self, layer: int, expert: int, host: int) -> None:
        """Put a replica into a free slot."""
        self.at[layer, host, self.used[layer, host]] = expert
        self.used[layer, host] += 1
        self.hold[layer, expert, host] = True
        self.near[layer, expert, self.node_of[host]] += 1
        self.load[layer, host] += self.weight[layer, expert]

    def _take(self, layer: int, host: int, expert: int) -> None:
        """Take a replica away; the replica of the last slot fills the gap."""
        last = int(self.used[layer, host]) - 1
        slot = self.at[layer, host, : last + 1].tolist().index(expert)
        self.at[layer, host, slot] = self.at[layer, host, last]
        self.at[layer, host, last] = self.n_experts + 1
        self.used[layer, host] = last
        self.hold[layer, expert, host] = False
        self.near[layer, expert, self.node_of[host]] -= 1
        self.load[layer, host] -= self.weight[layer, expert]

    def _takers(self, layer: int, expert: int) -> NDArray[np.int64]:
        """Hosts that may take a replica by the rules, with or without a free slot."""
        near = self.near[layer, expert]
        found = ~self.hold[layer, expert]
        placed = int(near.sum())
        if len(near) > 1 and placed and self.copies[layer, expert] > 1:
            found &= near[self.node_of] != placed
        return np.nonzero(found)[0]

    def _squeeze_in(self, layer: int, expert: int) -> None:
        """Place a replica that no host with a free slot may take: another replica moves on to such a host."""
        if any(self._hand_on(layer, expert, hands) for hands in range(1, _HANDS + 1)):
            return
        # The rules leave no other way: one host holds one replica more.
        takers = self._takers(layer, expert)
        host = int(takers[(self.used[layer, takers] - self.room[layer, takers]).argmin()])
        if self.used[layer, host] == self.at.shape[2]:
            more = np.full((*self.at.shape[:2], 1), self.n_experts + 1, dtype=np.int64)
            self.at = np.concatenate([self.at, more], axis=2)
        self.vacant[layer] = False
        self._put(layer, expert, host)

    def _hand_on(self, layer: int, expert: int, hands: int) -> bool:
        """Place a replica by moving `hands` others on from host to host; returns whether that is possible."""
        takers = self._takers(layer, expert)
        if not hands:
            takers = takers[self.used[layer, takers] < self.room[layer, takers]]
        for host in takers[np.argsort(self.load[layer, takers], kind="stable")].tolist():
            if not hands:
                self._put(layer, expert, host)
                return True
            for other in self.at[layer, host, : self.used[layer, host]].tolist():
                self._take(layer, host, other)
                self._put(layer, expert, host)  # first, so that the other replica finds no slot here
                if self._hand_on(layer, other, hands - 1):
                    return True
                self._take(layer, host, expert)
                self._put(layer, other, host)
        return False


__all__ = ["HostSlots"]
