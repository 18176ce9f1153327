"""Whether the nodes of a Ray cluster have room for expert hosts now, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ray._private.state import state

from cluster.config import ClusterConfig

FIELDS = {"CPU": "cluster.cpus_per_host", "GPU": "cluster.gpus_per_host"}


def free_resources() -> list[dict[str, float]]:
    """Free resources of each live node, a moment ago."""
    return [dict(free) for free in state.available_resources_per_node().values()]


def resources_of_a_host(cluster: ClusterConfig) -> dict[str, float]:
    """Resources that an expert host reserves."""
    asked = {"CPU": cluster.cpus_per_host, "GPU": cluster.gpus_per_host, **cluster.host_resources}
    return {name: amount for name, amount in asked.items() if amount > 0}


def lacking(hosts: int, asked: Mapping[str, float], free: Sequence[Mapping[str, float]]) -> str:
    """What the cluster lacks to start so many more hosts; empty if there is room for them.

    Args:
        hosts: Number of hosts.
        asked: Resources that each reserves.
        free: Free resources of each node.
    """
    if not asked:
        return ""
    room = sum(_places(asked, node) for node in free)
    if room >= hosts:
        return ""
    needs = ", ".join(
        f"{amount:g} {name} ({FIELDS.get(name, 'cluster.host_resources')})" for name, amount in asked.items()
    )
    most = ", ".join(f"{max((node.get(name, 0.0) for node in free), default=0.0):g} {name}" for name in asked)
    who = "an expert host waits" if hosts == 1 else f"{hosts} expert hosts wait"
    return (
        f"{who} to be started, and the Ray cluster has room for {room}: each takes {needs} on one node, and "
        f"a node has at most {most} free; add a node, or lower these fields"
    )


def _places(asked: Mapping[str, float], free: Mapping[str, float]) -> int:
    return min(math.floor(free.get(name, 0.0) / amount + 1e-6) for name, amount in asked.items())


__all__ = ["free_resources", "lacking", "resources_of_a_host"]
