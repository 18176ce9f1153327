"""`raymoe drain --node`: what a Ray node holds goes elsewhere before the node ends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray._private.state import actors
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from actors.rpc.coordinator_client import AdminClient
from errors import RaymoeError, ResourceError
from jobs.tools.running_job import on_cluster, seen_coordinators

_POLL_SECONDS = 0.5
_REPLICA = "ServeReplica:"
"""What the class names of Ray Serve's replicas begin with."""


def leave(node: str | None, *, address: str | None, timeout: float, debug: bool = False) -> dict[str, Any]:
    """Empty a Ray node: expert hosts give their experts to hosts elsewhere, Ray Serve moves its replicas.

    Args:
        node: its id, or how it begins; None is the node that this process runs on.
        timeout: seconds for all of it; the node may be gone after that.

    Returns:
        node, drained (ids of hosts), replicas (of Ray Serve), seconds.

    Raises:
        ResourceError: there is no such node, or more than one, or Ray refuses.
        RaymoeError: something is still there when the time is over, or cannot be asked; the rest is drained.
    """
    began = time.monotonic()
    deadline = began + timeout
    with on_cluster(address, debug=debug), ExitStack() as jobs:
        node = _whole_id(node or ray.get_runtime_context().get_node_id())
        _refuse_newcomers(node, timeout)
        replicas = _replicas(node)
        found, silent = seen_coordinators()
        clients = [jobs.enter_context(closing(AdminClient(at))) for at in found]
        # Each job at its own pace: one that is stuck keeps nobody else's experts on a node that ends.
        with ThreadPoolExecutor(max(1, len(clients)), thread_name_prefix="drain") as threads:
            parts = list(threads.map(lambda job: drain_hosts(job, node, deadline), clients))
        while _replicas(node) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        failed = [f"{name} does not answer" for name in silent]
        failed += [why for part in parts for why in part.failed]
        if left := _replicas(node):
            failed.append(f"Ray Serve has {left} replicas there still")
    if failed:
        seconds = time.monotonic() - began
        raise RaymoeError(f"node {node} is not empty after {seconds:.1f} s: {'; '.join(failed)}")
    return {
        "node": node,
        "drained": [id for part in parts for id in part.drained],
        "replicas": replicas,
        "seconds": round(time.monotonic() - began, 3),
    }


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What became of a job's expert hosts on a node.

    Attributes:
        drained: ids of those that hold no experts any more.
        failed: why the others do, or may.
    """

    drained: list[str]
    failed: list[str]


class DrainableJob(Protocol):
    """What `drain_hosts` needs of an `AdminClient`."""

    def status(self) -> dict[str, Any]:
        """See `AdminClient.status`."""

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        """See `AdminClient.drain`."""


def drain_hosts(job: DrainableJob, node: str, deadline: float) -> DrainResult:
    """Drain a job's hosts on a node one after the other, as far as it goes.

    Args:
        deadline: of `time.monotonic`; a host that comes after it is asked all the same, and not waited for.
    """
    found = DrainResult([], [])
    try:
        hosts = [host["id"] for host in job.status()["hosts"] if host["node"] == node]
    except RaymoeError as error:
        return DrainResult([], [str(error)])
    for id in hosts:
        try:
            done = job.drain(id, replace=True, timeout=max(0.0, deadline - time.monotonic()))["done"]
        except RaymoeError as error:
            found.failed.append(f"{id}: {error}")
            continue
        if done:
            found.drained.append(id)
        else:
            found.failed.append(f"{id} still holds experts; give it more --timeout")
    return found


def _whole_id(node: str) -> str:
    """Of the node that this is, or begins, the id of; `raymoe status` shows the beginnings."""
    alive = [one["NodeID"] for one in ray.nodes() if one["Alive"]]
    found = [id for id in alive if id.startswith(node)]
    if len(found) != 1:
        what = "no Ray node" if not found else f"{len(found)} Ray nodes have an id that begins with"
        raise ResourceError(
            f"{what} {node}{' is alive' if not found else ''}; `raymoe status` shows those with expert hosts"
        )
    return str(found[0])


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


__all__ = ["drain_hosts", "leave"]
