"""The published algorithm of deepseek-ai/EPLB, implemented from its description, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace


def eplb_host_loads(
    loads: Sequence[float], *, n_replicas: int, n_group: int, n_nodes: int, n_hosts: int
) -> list[float]:
    """Load of each host of one layer after EPLB has replicated and packed its experts.

    Hierarchical when the nodes divide the groups: groups are packed onto nodes, then experts are
    replicated and packed within each node. Global otherwise: all hosts are one node, without groups.

    Args:
        loads: Load of each expert.
        n_replicas: Number of experts and redundant replicas together, a multiple of `n_hosts`.
    """
    if n_replicas % n_hosts or n_hosts % n_nodes:
        raise ValueError(f"EPLB needs {n_replicas} replicas and {n_nodes} nodes to divide {n_hosts} hosts")
    if n_group % n_nodes:
        n_group = n_nodes = 1
    size = len(loads) // n_group
    groups = [list(loads[at * size : (at + 1) * size]) for at in range(n_group)]
    found: list[float] = []
    for packed in pack_evenly([sum(group) for group in groups], n_nodes):
        experts = [load for group in packed for load in groups[group]]
        replicas = replicate(experts, n_replicas // n_nodes)
        packs = pack_evenly(replicas, n_hosts // n_nodes)
        found += [sum(replicas[at] for at in pack) for pack in packs]
    return found


def replicate(loads: Sequence[float], n_replicas: int) -> list[float]:
    """Load of each replica; every further replica goes to the expert with the highest load per replica."""
    counts = [1] * len(loads)
    hottest = [(-load, expert) for expert, load in enumerate(loads)]
    heapify(hottest)
    for _ in range(n_replicas - len(loads)):
        expert = hottest[0][1]
        counts[expert] += 1
        heapreplace(hottest, (-loads[expert] / counts[expert], expert))
    return [load / count for load, count in zip(loads, counts, strict=True) for _ in range(count)]


def pack_evenly(loads: Sequence[float], n_packs: int) -> list[list[int]]:
    """Packs with equal numbers of items: the heaviest remaining item goes to the lightest pack with room."""
    each = len(loads) // n_packs
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    lightest = [(0.0, pack) for pack in range(n_packs)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        weight, pack = heappop(lightest)
        packs[pack].append(item)
        if len(packs[pack]) < each:
            heappush(lightest, (weight + loads[item], pack))
    return packs


__all__ = ["eplb_host_loads", "pack_evenly", "replicate"]
