"""Placement by counts, without loads: equally many experts per host, few moves, groups kept together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.topology import Holders


@dataclass(slots=True)
class GroupPart:
    """Experts of one group that have the same holders, and move together."""

    group: int
    experts: list[int]
    hosts: list[int]


def place_by_count(
    home: Holders,
    held: Sequence[Sequence[Sequence[int]]] | None,
    *,
    n_group: int,
    nodes: Sequence[str],
    replicas: int,
) -> Holders:
    """Holders of each expert: those in `held`, with missing replicas added and the counts evened out.

    Args:
        home: `[L][E]` one holder of each expert: the placement from nothing, without replicas.
        held: `[H][L]` expert ids that each host holds; None begins with `home`.
        n_group: Expert groups of a layer.
        nodes: `[H]` node of each host.
        replicas: Holders of each expert, at most H.
    """
    rows: list[tuple[tuple[int, ...], ...]] = []
    known: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = {}
    for layer, row in enumerate(home):
        now = row
        if held is not None:
            lists: list[list[int]] = [[] for _ in row]
            for host, layers in enumerate(held):
                for expert in layers[layer]:
                    lists[expert].append(host)
            now = tuple(map(tuple, lists))
        if held is None and replicas == 1:
            rows.append(now)
            continue
        # Layers with the same holders get the same placement, which is computed once.
        turn = layer % len(nodes) if _uneven(row, len(nodes)) else 0
        key = (now, row, turn)
        if key not in known:
            known[key] = LayerPlacement(now, row, n_group, nodes, replicas, turn).result(held is not None)
        rows.append(known[key])
    return tuple(rows)


def _uneven(row: Sequence[Sequence[int]], n_hosts: int) -> bool:
    """Whether some hosts hold more experts than others; in other layers it should be other hosts."""
    counts = [0] * n_hosts
    for (host,) in row:
        counts[host] += 1
    return len(set(counts)) > 1


class LayerPlacement:
    """Changes one layer's holders into a placement.

    Args:
        now: `[E]` present holders of each expert.
        home: `[E]` one holder of each expert in the placement from nothing.
        n_group: Expert groups of the layer.
        nodes: `[H]` node of each host.
        replicas: Holders of each expert.
        turn: The host that ties are decided for.
    """

    def __init__(
        self,
        now: Sequence[Sequence[int]],
        home: Sequence[Sequence[int]],
        n_group: int,
        nodes: Sequence[str],
        replicas: int,
        turn: int,
    ) -> None:
        self.nodes, self.replicas, self.turn = nodes, replicas, turn
        self.n_experts, self.hosts = len(now), range(len(nodes))
        self.several_nodes = len(set(nodes)) > 1
        size = len(now) // n_group
        parts: dict[tuple[int, tuple[int, ...]], GroupPart] = {}
        for expert, hosts in enumerate(now):
            at = (expert // size, tuple(hosts))
            parts.setdefault(at, GroupPart(at[0], [], list(hosts))).experts.append(expert)
        self.parts = list(parts.values())
        self.count = [0] * len(nodes)
        self.of_group = [[0] * len(nodes) for _ in range(n_group)]
        self.both = [[0] * len(nodes) for _ in nodes]  # experts that both of two hosts hold
        for part in self.parts:
            hosts, part.hosts = part.hosts, []
            for host in hosts:
                self._give(part, host)
        # Bounds: the counts of the placement from nothing, shifted by one host for every replica.
        shares = [0] * len(nodes)
        for (host,) in home:
            shares[host] += 1
        sums = [sum(shares[(h + j) % len(nodes)] for j in range(replicas)) for h in self.hosts]
        self.least, self.most = min(sums), max(sums)
        # Difference of hosts' counts that moves nothing: a group, or a host's largest share of a group.
        self.unit = size if len(nodes) <= n_group else -(-size // (len(nodes) // n_group))
        self.joined = {host for host in self.hosts if not self.count[host]}

    def result(self, was_held: bool) -> tuple[tuple[int, ...], ...]:
        """Holders of each expert, in the order of replicas."""
        self._drop()
        self._add()
        self._even_out()
        if was_held:
            self._choose_primaries()
        found: list[tuple[int, ...]] = [()] * self.n_experts
        for part in self.parts:
            for expert in part.experts:
                found[expert] = tuple(part.hosts)
        return tuple(found)

    def _drop(self) -> None:
        """Remove holders beyond `replicas`, and one holder where all share a node."""
        for part in self.parts:
            while len(part.hosts) > self.replicas - self._exposed(part.hosts):
                may_go = [host for host in part.hosts if self._safe_without(part, host)] or part.hosts
                self._remove(part, max(may_go, key=lambda host: (self.count[host], self._rank(host))))

    def _add(self) -> None:
        """Give missing replicas to the hosts with the fewest experts, in whole parts where they fit."""
        queue = sorted(self.parts, key=lambda part: len(part.hosts))
        while queue:
            part = queue.pop(0)
            if len(part.hosts) >= self.replicas:
                continue
            allowed = [host for host in self.hosts if self._may_take(part, host)]
            need = len(part.experts)
            room = {host: self.most - self.count[host] for host in allowed}

            def order(host: int) -> tuple[object, ...]:
                return (
                    room[host] < need,  # noqa: B023
                    self.count[host],
                    self._shared(part, host),  # noqa: B023
                    -self.of_group[part.group][host],  # noqa: B023
                    self._rank(host),
                )

            host = min(allowed, key=order)
            if room[host] < need and max(room.values()) > 0:
                host = max(allowed, key=lambda host: (room[host], -self._rank(host)))
                queue.insert(0, self._split(part, room[host]))
            self._give(part, host)
            queue.insert(0, part)

    def _even_out(self) -> None:
        """Move parts to hosts that have joined, and between hosts whose counts differ by more than `unit`."""
        while any(self._transfer(*transfer) for transfer in self._transfers()):
            pass

    def _transfers(self) -> Iterator[tuple[int, int, int]]:
        """Possible transfers (donor, taker, experts), between the most different counts first."""
        count = list(self.count)
        takers = sorted(self.hosts, key=lambda host: (count[host], self._rank(host)))
        if max(count) - min(count) <= self.unit:
            takers = [host for host in takers if host in self.joined and count[host] < self.least]
        donors = sorted(self.hosts, key=lambda host: (-count[host], self._rank(host)))
        for donor in donors if takers else ():
            for taker in takers:
                wanted = max(count[donor] - self.most, self.least - count[taker])
                possible = min(count[donor] - self.least, self.most - count[taker])
                if min(wanted, possible) > 0:
                    yield donor, taker, min(wanted, possible)

    def _transfer(self, donor: int, taker: int, amount: int) -> bool:
        """Move at most `amount` experts of one part; returns whether any could be moved."""
        may_go = [
            part
            for part in self.parts
            if donor in part.hosts
            and taker not in part.hosts
            and not self._exposed([taker if host == donor else host for host in part.hosts])
        ]
        if not may_go:
            return False
        fits = [part for part in may_go if len(part.experts) <= amount]
        part = max(
            fits or may_go,
            key=lambda part: (
                part.hosts[0] != donor,  # primaries are even from the beginning
                len(part.experts) if fits else 0,
                self.of_group[part.group][taker],
                -part.experts[0],
            ),
        )
        if len(part.experts) > amount:
            self._split(part, amount)
        rank = part.hosts.index(donor)
        self._remove(part, donor)
        self._give(part, taker)
        part.hosts.insert(rank, part.hosts.pop())
        return True

    def _choose_primaries(self) -> None:
        """Order holders so that hosts are primaries of as equal numbers of experts as possible."""
        primaries = [0] * len(self.nodes)
        for part in sorted(self.parts, key=lambda part: (len(part.hosts), -len(part.experts), part.experts)):
            part.hosts.sort(key=lambda host: (primaries[host], self._rank(host)))
            primaries[part.hosts[0]] += len(part.experts)
        while path := self._relief(primaries):
            for part, host in path:
                primaries[part.hosts[0]] -= len(part.experts)
                primaries[host] += len(part.experts)
                part.hosts.remove(host)
                part.hosts.insert(0, host)

    def _relief(self, primaries: Sequence[int]) -> list[tuple[GroupPart, int]]:
        """Parts of one size and their new primaries: a path from the host with most to one with fewer."""
        led: list[list[GroupPart]] = [[] for _ in self.nodes]
        for part in self.parts:
            if len(part.hosts) > 1:
                led[part.hosts[0]].append(part)
        most = max(primaries)
        sizes = sorted({len(part.experts) for part in self.parts if len(part.hosts) > 1}, reverse=True)
        for size in sizes:
            if most - min(primaries) <= size:
                continue
            came: dict[int, tuple[GroupPart, int] | None] = {
                h: None for h in self.hosts if primaries[h] == most
            }
            queue = list(came)
            for here in queue:
                for part in led[here]:
                    for there in part.hosts[1:]:
                        if there in came or len(part.experts) != size:
                            continue
                        came[there] = (part, here)
                        queue.append(there)
                        if most - primaries[there] > size:
                            return self._path(came, there)
        return []

    @staticmethod
    def _path(came: Mapping[int, tuple[GroupPart, int] | None], there: int) -> list[tuple[GroupPart, int]]:
        """The changes of primaries that lead to a host, the last one first."""
        path: list[tuple[GroupPart, int]] = []
        while (step := came[there]) is not None:
            path.append((step[0], there))
            there = step[1]
        return path

    def _rank(self, host: int) -> int:
        """Order of hosts with equal counts, which differs from layer to layer."""
        return (host - self.turn) % len(self.nodes)

    def _exposed(self, hosts: Sequence[int]) -> bool:
        """Whether all replicas would fail with one node, although there are other nodes."""
        return self.several_nodes and len(hosts) > 1 and len({self.nodes[host] for host in hosts}) == 1

    def _safe_without(self, part: GroupPart, host: int) -> bool:
        return not self._exposed([other for other in part.hosts if other != host])

    def _may_take(self, part: GroupPart, host: int) -> bool:
        last = len(part.hosts) + 1 == self.replicas
        return host not in part.hosts and not (last and self._exposed([*part.hosts, host]))

    def _shared(self, part: GroupPart, host: int) -> tuple[int, int]:
        """What a host has in common with a part's holders: replicas on its node, experts that both hold."""
        near = sum(self.nodes[other] == self.nodes[host] for other in part.hosts)
        return near, sum(self.both[host][other] for other in part.hosts)

    def _give(self, part: GroupPart, host: int) -> None:
        part.hosts.append(host)
        self._record(part, host, len(part.experts))

    def _remove(self, part: GroupPart, host: int) -> None:
        self._record(part, host, -len(part.experts))
        part.hosts.remove(host)

    def _record(self, part: GroupPart, host: int, experts: int) -> None:
        self.count[host] += experts
        self.of_group[part.group][host] += experts
        for other in part.hosts:
            if other != host:
                self.both[host][other] += experts
                self.both[other][host] += experts

    def _split(self, part: GroupPart, keep: int) -> GroupPart:
        """Cut a part after `keep` experts; returns the rest."""
        rest = GroupPart(part.group, part.experts[keep:], list(part.hosts))
        part.experts = part.experts[:keep]
        self.parts.append(rest)
        return rest


__all__ = ["place_by_count"]
