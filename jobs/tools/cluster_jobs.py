"""The jobs on a Ray cluster, found through Ray: for clusters of other machines and of other users."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # compiled
from ray.exceptions import RayError

from actors.messages.job_identity import COORDINATOR, NAMESPACE
from actors.rpc.admin_client import AdminClient
from errors import RaymoeError
from jobs.fleet.ray_address import fit_cluster, only_address
from jobs.fleet.ray_session import ResourceNeeds, ray_session
from jobs.tools.jobs_found import HERE, JobsFound, RunningJob, described

_ASK_SECONDS = 10.0


def rehearse(
    faults: Sequence[Any], job: RunningJob, client: AdminClient, *, debug: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Carry out a schedule of faults (`Fault`) on a job; returns the result of `jobs.tools.chaos.run_chaos`.

    Raises:
        ResourceError: The job's Ray cluster does not answer.
    """
    from jobs.tools.chaos import run_chaos

    with on_cluster(job.cluster or None, debug=debug):
        return run_chaos(client, faults, tell=tell)


def jobs_on(address: str, *, debug: bool = False) -> JobsFound:
    """The jobs on the Ray cluster at an address.

    Args:
        address: Its address; `auto` as in `running_address`.
        debug: Show the output of actors.

    Raises:
        ResourceError: There is no cluster.
    """
    with on_cluster(address, debug=debug):
        found, silent = seen_coordinators()

    def unknown(coordinator: str) -> RunningJob:
        return RunningJob(coordinator=coordinator, cluster=address, doing="does not answer")

    jobs = [described(at, unknown(at)) for at in found]
    return JobsFound(jobs, f"on the Ray cluster at {address}", silent=silent)


@contextmanager
def on_cluster(address: str | None, *, debug: bool = False) -> Iterator[str]:
    """Connect to a running Ray cluster; yield its address.

    Args:
        address: Its address; None takes RAY_ADDRESS, or without it the only cluster of this machine.
        debug: Show the output of actors.

    Raises:
        ResourceError: There is none, or this machine has several.
    """
    address = only_address(address)
    with ray_session(ResourceNeeds(cpus=0, why=""), address=address, debug=debug):
        yield address


def jobs_of(addresses: Sequence[str], *, debug: bool = False) -> JobsFound:
    """The jobs on Ray clusters that have a node on this machine; clusters that refuse are left out."""
    jobs: list[RunningJob] = []
    silent: list[str] = []
    for address in addresses:
        with suppress(RaymoeError):
            fit_cluster(address)
            if any(name.startswith(COORDINATOR) for name in living_actors(address)):
                found = jobs_on(address, debug=debug)
                jobs += found.jobs
                silent += found.silent
    return JobsFound(jobs, HERE, silent=silent)


def living_actors(address: str) -> list[str]:
    """Names of the actors that live on a cluster, which is not joined for that; none if it refuses."""
    state = GlobalState()
    state._initialize_global_state(GcsClientOptions.create(address, None, True, False))
    try:
        alive = state.actor_table(None, actor_state_name="ALIVE").values()
    except (RuntimeError, RayError):  # it refuses this user's token, or ends just now
        return []
    finally:
        state.disconnect()
    return [actor["Name"] for actor in alive if actor["Name"]]


def seen_coordinators() -> tuple[list[str], list[str]]:
    """Addresses of the coordinators that answer, and names of those that time out or have died."""
    from actors.remote import ask  # with torch, which a machine without jobs need not load

    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(COORDINATOR)
    ]
    asked: dict[Any, str] = {}
    for name in names:
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:  # it has died since
            continue
        asked[actor.address.remote()] = name
    if not asked:
        return [], []
    answered, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_SECONDS)
    found: list[str] = []
    silent = [asked[reference] for reference in waiting]
    for reference in answered:
        try:
            at = ask(reference, what="the coordinator")
        except RaymoeError:
            silent.append(asked[reference])
            continue
        found += [str(at)] if at else []  # a standby has no address
    return found, silent


__all__ = ["jobs_of", "jobs_on", "living_actors", "on_cluster", "rehearse", "seen_coordinators"]
