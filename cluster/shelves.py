"""Hosts as shelves with so many slots each, filled with replicas of experts by load."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
        self.room = _rooms(copies, self.nodes, counts)
        slots = int(self.room.max())
        self.at = np.full((n_layers, n_hosts, slots), self.n_experts + 1, dtype=np.int64)
        missing = slots - self.room
        self.vacant = (missing.max(axis=1) <= 1)[:, None] & (missing > 0)
        if held is not None:
            self._keep(held)

    def take_over(self, layers: NDArray[np.int64], other: Shelves, which: NDArray[np.bool_]) -> None:
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
        several = (self.copies[self.layers, steps] > 1).any(axis=1)
        # From here on all have one replica, and only room matters.
        singles = int(np.nonzero(several)[0].max(initial=-1)) + 1
        for expert in steps[:singles]:
            self._place_replica(expert, self._near_home(expert, homes, domain))
        self._place_singles(steps[singles:], homes, domain)
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
        turn = homes[self.layers, real] + self.near[self.layers, real].sum(axis=1)
        return np.where(domain == (turn % (int(domain.max()) + 1))[:, None], 0.0, 1e100)

    def _place_replica(self, expert: NDArray[np.int64], away: NDArray[np.float64] | float) -> None:
        """One of several replicas of an expert in every layer (`expert`: `[L]`)."""
        # Between equal hosts the node with less load, so that its other hosts stay open to other replicas.
        key = self.load + away + 1e-6 * (self.load @ self.nodes.T)[:, self.node_of]
        key[self.count >= self.room] = np.inf
        key[self.hold[self.layers, expert]] = np.inf
        if len(self.nodes) > 1:
            near = self.near[self.layers, expert]
            alone = (near > 0) & (near == near.sum(axis=1, keepdims=True))
            key[alone[:, self.node_of]] = np.inf
        to = key.argmin(axis=1)
        real = expert < self.n_experts
        stuck = real & np.isinf(key[self.layers, to])
        for layer in np.nonzero(stuck)[0].tolist():
            self._squeeze(layer, int(expert[layer]))
        todo = np.nonzero(real & ~stuck)[0]
        self._put(todo, expert[todo], to[todo])

    def _place_singles(
        self,
        steps: NDArray[np.int64],
        homes: NDArray[np.int64] | None,
        domain: NDArray[np.int64] | None,
    ) -> None:
        """Experts with one replica (`steps`: `[steps, L]`): any host with room will do."""
        n_hosts = self.load.shape[1]
        full = np.where(self.count >= self.room, np.inf, 0.0)
        first_slot = (np.arange(self.load.size) * self.at.shape[2]).reshape(self.load.shape)
        load, count, room, slots = (
            array.reshape(-1) for array in (self.load, self.count, self.room, self.at)
        )
        starts = self.layers * n_hosts
        for expert in steps:
            to = (self.load + full + self._near_home(expert, homes, domain)).argmin(axis=1) + starts
            if (real := expert < self.n_experts).all():
                put = expert
            else:
                put, to = expert[real], to[real]
            slots[first_slot.reshape(-1)[to] + count[to]] = put
            count[to] += 1
            load[to] += self.weight[self.layers if len(to) == len(starts) else np.nonzero(real)[0], put]
            full.reshape(-1)[to[count[to] >= room[to]]] = np.inf
        # Who holds what follows from the slots.
        layer, host, slot = np.nonzero(self.at < self.n_experts)
        expert = self.at[layer, host, slot]
        self.hold[layer, expert, host] = True
        self.near[:, : self.n_experts] = self.hold[:, : self.n_experts] @ self.nodes.T.astype(np.int64)

    def _put(self, layer: NDArray[np.int64], expert: NDArray[np.int64], host: NDArray[np.int64]) -> None:
        """Put replicas into free slots: one in each of some layers."""
        self.at[layer, host, self.count[layer, host]] = expert
        self.count[layer, host] += 1
        self.hold[layer, expert, host] = True
        self.near[layer, expert, self.node_of[host]] += 1
        self.load[layer, host] += self.weight[layer, expert]

    def _take(self, layer: int, host: int, slot: int) -> int:
        """Take away what lies in a slot; the last slot's replica fills the gap."""
        expert, last = int(self.at[layer, host, slot]), int(self.count[layer, host]) - 1
        self.at[layer, host, slot] = self.at[layer, host, last]
        self.at[layer, host, last] = self.n_experts + 1
        self.count[layer, host] = last
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

    def _keep(self, held: NDArray[np.bool_]) -> None:
        """Begin with what is held, as far as it fits."""
        held = held.copy()
        copies = self.copies[:, : self.n_experts]
        load = np.einsum("leh,le->lh", held, self.weight[:, : self.n_experts])
        mean = load.mean(axis=1)

        def drop(layer: int, expert: int, host: int) -> None:
            held[layer, expert, host] = False
            load[layer, host] -= self.weight[layer, expert]

        several = len(self.nodes) > 1
        near = np.einsum("leh,nh->len", held, self.nodes.astype(np.int64))
        many = near.sum(axis=2)
        exposed = several & (copies > 1) & (many >= copies) & (near.max(axis=2) == many)
        for layer, expert in np.argwhere((many > copies) | exposed).tolist():
            hosts = np.nonzero(held[layer, expert])[0].tolist()
            allowed = copies[layer, expert] - (1 if exposed[layer, expert] else 0)
            while len(hosts) > allowed:
                rest = [[other for other in hosts if other != host] for host in hosts]
                spans = [len({int(self.node_of[other]) for other in others}) > 1 for others in rest]
                host = max(range(len(hosts)), key=lambda i: (spans[i], load[layer, hosts[i]]))
                drop(layer, expert, hosts.pop(host))
        counts = held.sum(axis=1)
        for layer, host in np.argwhere(counts > self.room).tolist():
            for _ in range(int(counts[layer, host] - self.room[layer, host])):
                experts = np.nonzero(held[layer, :, host])[0]
                after = load[layer, host] - self.weight[layer, experts]
                drop(layer, int(experts[np.abs(after - mean[layer]).argmin()]), host)
        layers, experts, hosts = np.nonzero(held)
        for layer, expert, host in zip(layers.tolist(), experts.tolist(), hosts.tolist(), strict=True):
            self.at[layer, host, self.count[layer, host]] = expert
            self.count[layer, host] += 1
        self.hold[:, : self.n_experts] = held
        self.near[:, : self.n_experts] = np.einsum("leh,nh->len", held, self.nodes.astype(np.int64))
        self.load = np.einsum("leh,le->lh", held, self.weight[:, : self.n_experts])


def _rooms(
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


__all__ = ["Shelves"]
