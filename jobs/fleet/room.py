"""Which nodes of a Ray cluster have room for expert hosts now, and what is missing where none has."""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import ray
from ray._private.state import state

from cluster.config import ClusterConfig

FIELDS = {"CPU": "cluster.cpus_per_host", "GPU": "cluster.gpus_per_host"}


_ANSWER_SECONDS = 0.5  # a node on the same network answers within milliseconds


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources of each node by its id, a moment ago.

    Ray counts a node among the live ones until it has missed health checks for many seconds.
    """
    return {node: dict(free) for node, free in state.available_resources_per_node().items()}


def unreachable(nodes: Iterable[str]) -> set[str]:
    """Those of some nodes whose Ray process takes no connection, as that of a lost machine."""
    addresses = {
        node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in ray.nodes()
        if node["Alive"]
    }
    return {node for node in nodes if node not in addresses or not _answers(addresses[node])}


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


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


def nodes_to_take(
    hosts: int, asked: Mapping[str, float], free: Mapping[str, Mapping[str, float]], there: Iterable[str]
) -> list[str]:
    """The nodes to take so many more hosts, so that the loss of one node ends as few hosts as possible.

    Each goes to the node with the fewest hosts that has room; of several, to the one with room for the most.

    Args:
        hosts: Number of hosts.
        asked: Resources that each reserves.
        free: Free resources of each node, by its id.
        there: The node of each host that there is; those without one are ''.

    Returns:
        A node's id for each host; '' for those that have no room.
    """
    held = Counter(there)
    room = {node: _places(asked, resources) for node, resources in free.items()}
    taken = []
    for _ in range(hosts):
        with_room = [node for node in room if room[node] >= 1]
        best = min(with_room, key=lambda node: (held[node], -room[node], node), default="")
        if best:
            held[best] += 1
            room[best] -= 1
        taken.append(best)
    return taken


def _places(asked: Mapping[str, float], free: Mapping[str, float]) -> float:
    """How many hosts fit on a node; any number of those that reserve nothing."""
    if not asked:
        return math.inf
    return min(math.floor(free.get(name, 0.0) / amount + 1e-6) for name, amount in asked.items())


__all__ = ["free_resources", "lacking", "nodes_to_take", "resources_of_a_host", "unreachable"]
