"""`raymoe drain --node`: moves experts and replicas away from a Ray node before the node ends."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray._private.state import actors
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from actors.rpc.admin_client import AdminClient
from errors import ChangeUnderWay, ConfigError, RaymoeError, ResourceError
from jobs.serving.names import TRUNK
from jobs.tools.cluster_jobs import on_cluster, seen_coordinators
from jobs.tools.drain_refusal import refusal

_POLL_SECONDS = 0.5
_REPLICA = "ServeReplica:"
"""Prefix of the class names of Ray Serve's replicas."""

_TRUNK_REPLICA = re.compile(f"{_REPLICA}.*:{TRUNK}")


def leave(node: str | None, *, address: str | None, timeout: float, debug: bool = False) -> dict[str, Any]:
    """Drain a Ray node: experts move to hosts on other nodes, and Ray Serve moves its replicas.

    Args:
        node: Id of the node, or its beginning; None is the node of this process.
        address: Address of the Ray cluster; None takes RAY_ADDRESS, or the only cluster of this machine.
        timeout: Seconds for the whole drain, after which the node may end.
        debug: Show the output of actors.

    Returns:
        node, drained (ids of hosts), jobs (with a host there: name, id, drained), replicas (trunk replicas
        that have another in their place), replicas_ended (trunk replicas that have none), seconds.

    Raises:
        ConfigError: There is no such node, or more than one, or what runs there cannot move: it is the only
            node, or the head node of a deployment. Nothing was changed.
        ResourceError: Ray refuses.
        RaymoeError: At the end of the time something has not moved, or did not answer.
    """
    began = time.monotonic()
    deadline = began + timeout
    with on_cluster(address, debug=debug), ExitStack() as jobs:
        node = _whole_id(node or ray.get_runtime_context().get_node_id())
        before = list(actors().values())
        if why := refusal(node, ray.nodes(), before):
            raise ConfigError(why)
        _refuse_newcomers(node, timeout)
        found, silent = seen_coordinators()
        clients = [jobs.enter_context(closing(AdminClient(at))) for at in found]
        # All jobs at the same time, so that one that does not answer does not delay the others.
        with ThreadPoolExecutor(max(1, len(clients)), thread_name_prefix="drain") as threads:
            parts = list(threads.map(lambda job: drain_hosts(job, node, deadline), clients))
            names = list(threads.map(_called, clients, found))
        while _replicas(node) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        failed = [f"{name} does not answer" for name in silent]
        failed += [
            f"{job['name']}: {why}" for job, part in zip(names, parts, strict=True) for why in part.failed
        ]
        if left := _replicas(node):
            failed.append(f"Ray Serve has {left} replicas there still")
        moved, ended = moved_replicas(node, before, list(actors().values()))
    if failed:
        seconds = time.monotonic() - began
        raise RaymoeError(f"node {node} is not empty after {seconds:.1f} s: {'; '.join(failed)}")
    return {
        "node": node,
        "drained": [id for part in parts for id in part.drained],
        "jobs": [
            {**job, "drained": part.drained} for job, part in zip(names, parts, strict=True) if part.drained
        ],
        "replicas": moved,
        "replicas_ended": ended,
        "seconds": round(time.monotonic() - began, 3),
    }


@dataclass(frozen=True, slots=True)
class DrainResult:
    """Result of draining a job's expert hosts on a node.

    Attributes:
        drained: Ids of hosts that hold no experts any more.
        failed: Reasons why other hosts still hold experts, or may.
    """

    drained: list[str]
    failed: list[str]


class DrainableJob(Protocol):
    """The calls of an `AdminClient` that `drain_hosts` needs."""

    def status(self) -> dict[str, Any]:
        """The status of the job."""

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        """Drain one host, waiting for at most `timeout` seconds."""


def drain_hosts(job: DrainableJob, node: str, deadline: float) -> DrainResult:
    """Drain a job's hosts on a node one after the other.

    Args:
        job: Client of the job's coordinator.
        node: Id of the node.
        deadline: Time by `time.monotonic`, after which hosts are still told to drain, but not waited for. A
            drain that is refused during another change is asked for again until then.
    """
    found = DrainResult([], [])
    try:
        hosts = [host["id"] for host in job.status()["hosts"] if host["node"] == node]
    except RaymoeError as error:
        return DrainResult([], [str(error)])
    for id in hosts:
        try:
            done = _drain_in_turn(job, id, deadline)["done"]
        except RaymoeError as error:
            found.failed.append(f"{id}: {error}")
            continue
        if done:
            found.drained.append(id)
        else:
            found.failed.append(f"{id} still holds experts; give it more --timeout")
    return found


def _drain_in_turn(job: DrainableJob, host: str, deadline: float) -> dict[str, Any]:
    """Drain one host, after a change of the hosts that is under way."""
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return job.drain(host, replace=True, timeout=left)
        except ChangeUnderWay:
            if not left:
                raise
            time.sleep(min(_POLL_SECONDS, left))


def _called(job: AdminClient, address: str) -> dict[str, str]:
    """What a job is called; its address where it does not answer."""
    try:
        found = job.describe()
    except RaymoeError:
        return {"name": address.removeprefix("grpc:"), "id": ""}
    return {"name": found["name"], "id": found["id"]}


def _whole_id(node: str) -> str:
    """The full id of the node whose id has this beginning; `raymoe status` shows the beginnings."""
    alive = [one["NodeID"] for one in ray.nodes() if one["Alive"]]
    found = [id for id in alive if id.startswith(node)]
    if len(found) != 1:
        what = "no Ray node" if not found else f"{len(found)} Ray nodes have an id that begins with"
        raise ConfigError(
            f"{what} {node}{' is alive' if not found else ''}; `raymoe status` shows those with expert hosts"
        )
    return str(found[0])


def _refuse_newcomers(node: str, timeout: float) -> None:
    """Have Ray place no new actors on the node, or the replacement of a host could start there again."""
    # As the command `ray drain-node` does, and the autoscaler before it removes a node.
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline = int((time.time() + timeout) * 1000)
    try:
        accepted, why = gcs.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "raymoe drain", deadline)
    except (RuntimeError, ValueError, ray.exceptions.RaySystemError) as error:
        accepted, why = False, str(error)
    if not accepted:
        raise ResourceError(f"Ray does not drain node {node}: {why}; `ray status` shows what there is")


def moved_replicas(
    node: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    """Numbers of a node's trunk replicas that have another in their place elsewhere, and that have none.

    Args:
        node: Id of the node.
        before: All actors of the Ray cluster before the drain, as Ray describes them.
        after: All actors after it.
    """
    old, new = _trunk_replicas(before), _trunk_replicas(after)
    gone = sum(at == node and id not in new for id, at in old.items())
    started = sum(at != node and id not in old for id, at in new.items())
    moved = min(gone, started)
    return moved, gone - moved


def _trunk_replicas(known: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Node of each trunk replica that is alive, by the id of its actor."""
    return {
        actor["ActorID"]: actor["Address"]["NodeID"]
        for actor in known
        if actor["State"] == "ALIVE" and _TRUNK_REPLICA.fullmatch(actor["ActorClassName"])
    }


def _replicas(node: str) -> int:
    """Number of Ray Serve's replicas of any kind on a node."""
    return sum(
        actor["State"] == "ALIVE"
        and actor["Address"]["NodeID"] == node
        and actor["ActorClassName"].startswith(_REPLICA)
        for actor in actors().values()
    )


__all__ = ["drain_hosts", "leave", "moved_replicas"]
