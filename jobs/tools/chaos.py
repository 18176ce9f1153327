"""`raymoe chaos`: injects faults into a running job, so that its operators can rehearse failures.

The schedule of faults is a function of a seed. A Ray task on the node of a process carries out its fault;
only processes that Ray has started for this job are affected.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

import psutil
import ray
from ray._private.state import actors
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.rpc.admin_client import AdminClient
from actors.rpc.host_client import HostClient
from cluster.topology import HostInfo
from errors import RaymoeError


class FaultKind(StrEnum):
    """The kind of a fault.

    Attributes:
        KILL: The process is killed with SIGKILL.
        STOP: The process is stopped with SIGSTOP for some seconds, as if it hung.
        SLOW: The process is stopped and continued in turns for some seconds.
        DROP: All connections of routers to an expert host are closed.
    """

    KILL = "kill"
    STOP = "stop"
    SLOW = "slow"
    DROP = "drop"


TARGETS: Final = ("host", "coordinator", "trunk", "worker")
"""Kinds of processes that faults can affect."""

_POOL: Final = re.compile("ServeReplica:(.*):experts")
"""Class name of the actor that owns a served model's coordinator; it contains the application's name."""

_SECONDS: Final = {FaultKind.STOP: 10.0, FaultKind.SLOW: 5.0}
_LONGEST: Final = max(_SECONDS.values())
_PULSE: Final = 0.1  # seconds of one turn of SLOW, of which the process is stopped for the share _STILL
_STILL: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a schedule.

    Attributes:
        at: Seconds from the start.
        kind: Kind of the fault.
        target: Kind of the process, one of `TARGETS`.
        pick: A number in [0, 1) that selects one of the processes of this kind.
    """

    at: float
    kind: FaultKind
    target: str
    pick: float


def schedule(
    seed: int, *, duration: float, every: float, kinds: Sequence[FaultKind], targets: Sequence[str]
) -> list[Fault]:
    """A schedule of faults for `duration` seconds, one every `every` seconds on average, from a seed."""
    source = random.Random(seed)
    faults = []
    at = source.expovariate(1 / every)
    while at < duration:
        kind, target = source.choice(list(kinds)), source.choice(list(targets))
        if kind is FaultKind.DROP:
            target = "host"  # only expert hosts have such connections
        faults.append(Fault(at=round(at, 3), kind=kind, target=target, pick=source.random()))
        at += source.expovariate(1 / every)
    return faults


def run_chaos(
    job: AdminClient, faults: Sequence[Fault], *, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Carry out a schedule of faults on the Ray cluster that this process is connected to.

    Args:
        job: Client of the job's coordinator.
        faults: The schedule.
        tell: Called with a line of text for each fault.

    Returns:
        Each fault with `how`: the affected process, or why it was not carried out.
    """
    began = time.monotonic()
    done: list[dict[str, Any]] = []
    tasks: dict[Any, int] = {}  # they continue the processes that they stop, so they have to complete
    killed: set[tuple[str, int]] = set()
    for fault in faults:
        time.sleep(max(0.0, began + fault.at - time.monotonic()))
        try:
            if fault.kind is FaultKind.DROP:
                how = _drop(job, fault, killed)
            else:
                how, task = _signal(job, fault, killed)
                tasks.update({} if task is None else {task: len(done)})
        except (RaymoeError, RayError) as error:
            how = f"not done: {str(error).strip().splitlines()[0]}"
        tell(f"{time.monotonic() - began:7.2f} s  {fault.kind} {fault.target}: {how}")
        done.append({**asdict(fault), "how": how})
    for index in _without_effect(tasks):
        done[index]["how"] = f"not done: {done[index]['how']} was gone already"
        tell(
            f"{done[index]['at']:7.2f} s  {done[index]['kind']} {done[index]['target']}: {done[index]['how']}"
        )
    return done


def _drop(job: AdminClient, fault: Fault, killed: Set[tuple[str, int]]) -> str:
    hosts = [
        HostInfo(**{name: host[name] for name in ("id", "node", "pid", "addresses")})
        for host in job.status()["hosts"]
        if (host["node"], host["pid"]) not in killed
    ]
    if not hosts:
        return "not done: there is no expert host"
    host = hosts[int(fault.pick * len(hosts))]
    client = HostClient(host, timeout=10.0)
    try:
        client.disconnect_routers()
    finally:
        client.close()
    return f"connections of {host.id}"


def _signal(job: AdminClient, fault: Fault, killed: set[tuple[str, int]]) -> tuple[str, Any]:
    """Start a task on the node of a process that carries out the fault.

    Args:
        job: Client of the job's coordinator.
        fault: The fault.
        killed: Node and process id of what this rehearsal has killed, which the coordinator and Ray may not
            have noticed yet; a process that is killed now is added.

    Returns:
        The affected process, or why there is none; the task, or None.
    """
    known = processes(fault.target, job.status(), list(actors().values()))
    found = [process for process in known if process not in killed]
    if not found:
        return "not done: there is none", None
    node, pid = found[int(fault.pick * len(found))]
    task = _on(node, _do).remote(pid, str(fault.kind), _SECONDS.get(fault.kind, 0.0))
    if fault.kind is FaultKind.KILL:
        killed.add((node, pid))
    return f"process {pid} on node {node[:8]}", task


def _without_effect(tasks: Mapping[Any, int]) -> list[int]:
    """Wait for the tasks of faults; the numbers of those that found no process."""
    if not tasks:
        return []
    ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=2 * _LONGEST)
    found = []
    for task in ended:
        with suppress(RayError):  # it has ended with its node
            found += [] if ray.get(task) else [tasks[task]]
    return sorted(found)


def processes(
    target: str, status: Mapping[str, Any], known: Sequence[Mapping[str, Any]]
) -> list[tuple[str, int]]:
    """Node and process id of a job's processes of one kind, in a stable order.

    Args:
        target: One of `TARGETS`.
        status: The job's status.
        known: All actors of the Ray cluster, as Ray describes them.
    """
    if target == "host":
        return sorted((host["node"], host["pid"]) for host in status["hosts"])
    alive = [actor for actor in known if actor["State"] == "ALIVE"]
    wanted = [actor for actor in alive if actor["ActorID"] == status["actor"]]  # the others are standbys
    if target != "coordinator":
        wanted = [actor for leading in wanted for actor in alive if _belongs(actor, target, leading, alive)]
    return sorted((actor["Address"]["NodeID"], actor["Pid"]) for actor in wanted)


def _belongs(
    actor: Mapping[str, Any],
    target: str,
    coordinator: Mapping[str, Any],
    alive: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether an actor is a trunk worker or a trunk replica of the job of a coordinator."""
    if target == "worker":
        mine = actor["JobID"] == coordinator["JobID"]
        return mine and "RayTrainWorker" in actor["ActorClassName"]
    owners = [one["ActorClassName"] for one in alive if one["Address"] == coordinator["OwnerAddress"]]
    apps = [found[1] for name in owners if (found := _POOL.fullmatch(name))]
    return any(actor["ActorClassName"] == f"ServeReplica:{app}:trunk" for app in apps)


def _on(node: str, work: Callable[..., Any]) -> Any:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(work)


def _do(pid: int, kind: str, seconds: float) -> bool:
    """Carry out a fault; runs as a task on the node, and affects only processes of the same parent.

    Returns:
        Whether there was such a process.
    """
    deadline = time.monotonic() + seconds
    try:
        process = psutil.Process(pid)
        if process.ppid() != os.getppid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, signal.SIGKILL if kind == FaultKind.KILL else signal.SIGSTOP)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    if kind == FaultKind.KILL:
        return True
    with suppress(ProcessLookupError):  # it was killed because it did not answer
        if kind == FaultKind.STOP:
            time.sleep(seconds)
        while kind == FaultKind.SLOW and time.monotonic() < deadline:
            time.sleep(_PULSE * _STILL)
            os.kill(pid, signal.SIGCONT)
            time.sleep(_PULSE * (1 - _STILL))
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)
    return True


__all__ = ["TARGETS", "Fault", "FaultKind", "processes", "run_chaos", "schedule"]
