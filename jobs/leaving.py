"""`raymoe drain --node`: what a Ray node holds goes elsewhere before the node ends."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import actors
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from actors.coordinator_client import AdminClient
from errors import RaymoeError, ResourceError
from jobs.operate import coordinators, on_cluster

_POLL_SECONDS = 0.5
_REPLICA = "ServeReplica:"
"""What the class names of Ray Serve's replicas begin with."""


def leave(node: str | None, *, address: str | None, timeout: float, debug: bool = False) -> dict[str, Any]:
    """Empty a Ray node: expert hosts give their experts to hosts elsewhere, Ray Serve moves its replicas.

    Args:
        node: its id; None is the node that this process runs on.
        timeout: seconds for all of it; the node may be gone after that.

    Returns:
        node, drained (ids of hosts), replicas (of Ray Serve), seconds.

    Raises:
        ResourceError: there is no such node, or Ray refuses.
        RaymoeError: something is still there when the time is over.
    """
    began = time.monotonic()
    with on_cluster(address, debug=debug):
        node = node or ray.get_runtime_context().get_node_id()
        if not any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
            raise ResourceError(f"no Ray node {node} is alive; `raymoe status` shows those with expert hosts")
        jobs = [AdminClient(at) for at in coordinators()]
        try:
            _refuse_newcomers(node, timeout)
            hosts = [
                (job, host["id"]) for job in jobs for host in job.status()["hosts"] if host["node"] == node
            ]
            for job, id in hosts:
                left = timeout - (time.monotonic() - began)
                if not job.drain(id, replace=True, timeout=max(0.1, left))["done"]:
                    raise RaymoeError(f"{id} still holds experts after {timeout:g} s; give it more --timeout")
            replicas = _replicas(node)
            while _replicas(node):
                if time.monotonic() - began > timeout:
                    raise RaymoeError(f"Ray Serve has replicas on node {node} after {timeout:g} s still")
                time.sleep(_POLL_SECONDS)
        finally:
            for job in jobs:
                job.close()
    return {
        "node": node,
        "drained": [id for _, id in hosts],
        "replicas": replicas,
        "seconds": round(time.monotonic() - began, 3),
    }


def _refuse_newcomers(node: str, timeout: float) -> None:
    """Have Ray place nothing more there: what replaces a host would come to the same node again."""
    # What the command `ray drain-node` does, and the autoscaler before it removes a node.
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline = int((time.time() + timeout) * 1000)
    try:
        accepted, why = gcs.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "raymoe drain", deadline)
    except (RuntimeError, ValueError, ray.exceptions.RaySystemError) as error:
        accepted, why = False, str(error)
    if not accepted:
        raise ResourceError(f"Ray does not drain node {node}: {why}; `ray status` shows what there is")


def _replicas(node: str) -> int:
    """Replicas of Ray Serve on a node."""
    return sum(
        actor["State"] == "ALIVE"
        and actor["Address"]["NodeID"] == node
        and actor["ActorClassName"].startswith(_REPLICA)
        for actor in actors().values()
    )


__all__ = ["leave"]
