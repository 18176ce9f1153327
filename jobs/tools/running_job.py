"""The coordinator of a running job: found and asked, for `raymoe status | scale | drain | chaos`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.remote import ask
from actors.rpc.coordinator_client import AdminClient
from errors import RaymoeError, ResourceError
from jobs.fleet.fleet import COORDINATOR, NAMESPACE
from jobs.fleet.ray_session import ResourceNeeds, check_answers, ray_session
from jobs.tools.chaos import Fault, run_chaos

_ASK_SECONDS = 10.0
_SHOWN_EVENTS = 12


@contextmanager
def operated(*, coordinator: str | None, address: str | None, debug: bool = False) -> Iterator[AdminClient]:
    """A client of the job that a command operates on.

    Args:
        coordinator: HOST:PORT of its coordinator; None looks for it on a Ray cluster.
        address: Address of that cluster; None takes the one on this machine.
        debug: Show the output of actors.

    Raises:
        ResourceError: There is no such job, or there are several.
    """
    at = coordinator or find_coordinator(address, debug=debug)
    client = AdminClient(at if at.startswith("grpc:") else f"grpc:{at}")
    try:
        yield client
    finally:
        client.close()


def rehearse(
    faults: Sequence[Fault],
    *,
    coordinator: str | None,
    address: str | None,
    debug: bool,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Carry out a schedule of faults on a job; returns the result of `jobs.tools.chaos.run_chaos`.

    Raises:
        ResourceError: There is no such job.
    """
    with operated(coordinator=coordinator, address=address, debug=debug) as job:
        at = address or os.environ.get("RAY_ADDRESS") or "auto"
        with ray_session(ResourceNeeds(cpus=0, why=""), address=at, debug=debug):
            return run_chaos(job, faults, tell=tell)


def find_coordinator(address: str | None, *, debug: bool = False) -> str:
    """Address of the only coordinator on a Ray cluster.

    Raises:
        ResourceError: There is no cluster, no coordinator, or more than one.
    """
    with on_cluster(address, debug=debug) as address:
        found = coordinators()
    if len(found) != 1:
        what = f"{len(found)} jobs with a coordinator run" if found else "no job with a coordinator runs"
        which = f": {', '.join(at.removeprefix('grpc:') for at in found)}" if found else ""
        raise ResourceError(
            f"{what} on the Ray cluster at {address}{which}; say which with --coordinator HOST:PORT, or give "
            "--address"
        )
    return found[0]


@contextmanager
def on_cluster(address: str | None, *, debug: bool = False) -> Iterator[str]:
    """Connect to a running Ray cluster; yield its address.

    Raises:
        ResourceError: There is none.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    check_answers(address)
    with ray_session(ResourceNeeds(cpus=0, why=""), address=address, debug=debug):
        yield address


def coordinators() -> list[str]:
    """Addresses of all coordinators on the cluster that this process is connected to.

    Raises:
        ResourceError: One does not answer.
    """
    found, silent = seen_coordinators()
    if silent:
        raise ResourceError(
            f"{', '.join(silent)} does not answer within {_ASK_SECONDS:g} s; name a job with --coordinator"
        )
    return found


def seen_coordinators() -> tuple[list[str], list[str]]:
    """Addresses of the coordinators that answer, and names of those that do not answer or die."""
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


def shown(status: dict[str, Any]) -> Group:
    """A job's status as tables for the terminal."""
    hosts = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "state", "node", "pid", "experts", "in flight", "rows", "channel"):
        hosts.add_column(
            column, justify="right" if column in ("pid", "experts", "in flight", "rows") else "left"
        )
    for host in status["hosts"]:
        state = host["state"] if host["answers"] else f"{host['state']}, silent"
        hosts.add_row(
            host["id"],
            state,
            host["node"][:8],
            str(host["pid"]),
            str(host["experts"]),
            str(host["in_flight"]),
            f"{host['rows']:,}",
            host["channel"],
        )
    what = "serves" if status["mode"] == "serve" else f"trains, at step {status['step']}"
    head = Text(
        f"{what}; epoch {status['epoch']}, {len(status['hosts'])} of {status['wanted']} expert hosts, "
        f"{status['replicas_min']} to {status['replicas_max']} replicas of an expert"
    )
    events = Table(box=None, pad_edge=False, show_header=False)
    for event in status["events"][-_SHOWN_EVENTS:]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        events.add_row(at, event["kind"], event["text"])
    return Group(head, Text(""), hosts, Text(""), events)


def watch(ask: Callable[[], dict[str, Any]], *, every: float = 1.0) -> None:
    """Show a job's status until Ctrl-C."""
    with Live(shown(ask()), console=Console(highlight=False), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(shown(ask()), refresh=True)
        except KeyboardInterrupt:
            return


__all__ = ["coordinators", "find_coordinator", "on_cluster", "operated", "shown", "watch"]
