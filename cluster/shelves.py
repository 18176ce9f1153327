"""Hosts as shelves with so many slots each, filled with replicas of experts by load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.rooms import keep, rooms


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
        self.loads, self.node_of, self.layers = loads, node_of, np.arange(n_layers)
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
        self.full = np.where(self.count < self.room, 0.0, np.inf)  # [L, H], added to what a place costs

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
        lacking = self.copies[:, : self.n_experts] - self.hold[:, : self.n_experts].sum(axis=2)
        order = np.argsort(-self.weight[:, : self.n_experts], axis=1, kind="stable")
        steps = self._steps(order, np.take_along_axis(lacking, order, axis=1))
        alone = np.logical_and(self.copies[self.layers, steps] == 1, steps < self.n_experts)
        single = np.logical_and.reduce(alone, axis=1).tolist()
        for at, expert in enumerate(steps):
            away = self._near_home(expert, homes, domain)
            if single[at]:
                self._place_single(expert, away)
            else:
                self._place_replica(expert, away)
        layer, host, slot = np.nonzero(self.at < self.n_experts)
        self.hold[layer, self.at[layer, host, slot], host] = True
        self.near[:, : self.n_experts] = self.hold[:, : self.n_experts] @ self.nodes.T.astype(np.int64)
        for layer, host in zip(*np.nonzero(self.vacant), strict=True):
            self.at[layer, host, -1] = self.n_experts
            self.hold[layer, self.n_experts, host] = True

    def _steps(self, order: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[steps, L]` experts to place, each so many times; E + 1 where a layer has nothing to do."""
        total = times.sum(axis=1)
        steps = np.full((len(order), int(total.max())), self.n_experts + 1, dtype=np.int64)
        steps[np.arange(steps.shape[1]) < total[:, None]] = np.repeat(order.ravel(), times.ravel())
        return np.ascontiguousarray(steps.T)

    def _near_home(
        self, expert: NDArray[np.int64], homes: NDArray[np.int64] | None, domain: NDArray[np.int64] | None
    ) -> NDArray[np.float64] | float:
        """`[L, H]` what it costs to leave the domain that an expert's next replica should be in."""
        if homes is None or domain is None:
            return 0.0
        real = np.minimum(expert, self.n_experts - 1)
        n_domains = int(domain.max()) + 1
        away = np.where(np.arange(n_domains)[:, None] == domain, 0.0, 1e100)
        found: NDArray[np.float64] = away[
            (homes[self.layers, real] + self.near[self.layers, real].sum(axis=1)) % n_domains
        ]
        return found

    def _place_replica(self, expert: NDArray[np.int64], away: NDArray[np.float64] | float) -> None:
        """One of several replicas of an expert in every layer (`expert`: `[L]`)."""
        # Between equal hosts the node with less load, so that its other hosts stay open to other replicas.
        node = 1e-6 * (self.load @ self.nodes.T)
        if len(self.nodes) > 1:
            near = self.near[self.layers, expert]
            node[(near > 0) & (near == near.sum(axis=1, keepdims=True))] = np.inf
        key = self.load + self.full + away + node[:, self.node_of]
        np.putmask(key, self.hold[self.layers, expert], np.inf)
        to = key.argmin(axis=1)
        real = expert < self.n_experts
        stuck = real & np.isinf(key[self.layers, to])
        for layer in np.nonzero(stuck)[0].tolist():
            self._squeeze(layer, int(expert[layer]))
        todo = np.nonzero(real & ~stuck)[0]
        self._put(todo, expert[todo], to[todo])

    def _place_single(self, expert: NDArray[np.int64], away: NDArray[np.float64] | float) -> None:
        """The only replica of an expert in every layer: any host with room will do.

        Who holds it is not recorded, as nobody asks before the end.
        """
        to = (self.load + self.full + away).argmin(axis=1)
        flat = self.layers * self.load.shape[1] + to
        load, count, full = self.load.reshape(-1), self.count.reshape(-1), self.full.reshape(-1)
        slot = count[flat]
        self.at.reshape(-1)[flat * self.at.shape[2] + slot] = expert
        load[flat] += self.weight[self.layers, expert]
        count[flat] = slot + 1
        full[flat[slot + 1 >= self.room.reshape(-1)[flat]]] = np.inf

    def _put(self, layer: NDArray[np.int64], expert: NDArray[np.int64], host: NDArray[np.int64]) -> None:
        """Put replicas into free slots: one in each of some layers."""
        self.at[layer, host, self.count[layer, host]] = expert
        self.count[layer, host] += 1
        self.full[layer, host] = np.where(self.count[layer, host] < self.room[layer, host], 0.0, np.inf)
        self.hold[layer, expert, host] = True
        self.near[layer, expert, self.node_of[host]] += 1
        self.load[layer, host] += self.weight[layer, expert]

    def _take(self, layer: int, host: int, slot: int) -> int:
        """Take away what lies in a slot; the last slot's replica fills the gap."""
        expert, last = int(self.at[layer, host, slot]), int(self.count[layer, host]) - 1
        self.at[layer, host, slot] = self.at[layer, host, last]
        self.at[layer, host, last] = self.n_experts + 1
        self.count[layer, host] = last
        self.full[layer, host] = 0.0 if last < self.room[layer, host] else np.inf
        self.hold[layer, expert, host] = False
        self.near[layer, expert, self.node_of[host]] -= 1
        self.load[layer, host] -= self.weight[layer, expert]
        return expert

    def _allows(self, layer: int, expert: int, host: int) -> bool:
        """Whether a host may take a replica, as long as it has room."""
        near = self.near[layer, expert]
        alone = len(near) > 1 and near.sum() > 0 and near[self.node_of[host]] == near.sum()
        return not (self.hold[layer, expert, host] or (alone and self.copies[layer, expert] > 1))

    def _squeeze(self, layer: int, expert: int) -> None:
        """Place a replica that no host with room may take: on one that hands something on to such a host."""
        one = np.array([layer])
        free = np.nonzero(self.count[layer] < self.room[layer])[0].tolist()
        takers = [host for host in range(len(self.node_of)) if self._allows(layer, expert, host)]
        takers.sort(key=lambda host: float(self.load[layer, host]))
        for host in takers:
            for slot in range(int(self.count[layer, host])):
                other = self._take(layer, host, slot)
                to = next((to for to in free if to != host and self._allows(layer, other, to)), None)
                self._put(one, np.array([other]), np.array([host if to is None else to]))
                if to is not None:
                    self._put(one, np.array([expert]), np.array([host]))
                    return
        # The rules leave no other way: one host holds one expert more.
        host = min(takers, key=lambda host: int(self.count[layer, host] - self.room[layer, host]))
        if self.count[layer, host] == self.at.shape[2]:
            more = np.full((*self.at.shape[:2], 1), self.n_experts + 1, dtype=np.int64)
            self.at = np.concatenate([self.at, more], axis=2)
        self.vacant[layer] = False
        self._put(one, np.array([expert]), np.array([host]))


__all__ = ["Shelves"]
