"""Deploys an application with Ray Serve, and says what it waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from errors import ResourceError
from jobs.fleet.waiting import Tell, machine_load, telling
from jobs.serving.names import INTERFACE, POOL, TRUNK

_START_TRIES = 5
_POLL_SECONDS = 0.2
_EVERY_SECONDS = 10.0
_WORDS = {POOL: "coordinator and expert hosts", TRUNK: "trunk replicas", INTERFACE: "interface"}


def start_serve(tell: Tell, **options: Any) -> None:
    """Start Ray Serve's controller and proxies; Serve itself waits for a minute.

    Args:
        tell: Shows what is waited for.
        options: Options of `ray.serve.start`.

    Raises:
        ResourceError: They do not start.
    """
    with telling("Ray Serve", tell):
        for tried in range(_START_TRIES):
            try:
                serve.start(**options)
                return
            except (TimeoutError, RayActorError) as error:
                why = str(error).strip().splitlines()[0]
                if tried + 1 == _START_TRIES:
                    raise ResourceError(
                        f"Ray Serve has not started: {why} ({machine_load()}); try again, on a less busy "
                        "machine"
                    ) from error


def deploy(application: Any, *, name: str, tell: Tell) -> None:
    """Deploy an application; returns when all its parts answer.

    Args:
        application: From `build_application`.
        name: Its name in Serve.
        tell: Shows which parts are ready.

    Raises:
        ResourceError: A part failed; the message is its error.
    """
    target = serve.RunTarget(target=application, name=name, route_prefix="/")
    with suppress(TimeoutError):  # of the proxies, which are waited for below
        serve.run_many(
            [target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False
        )
    said, spoke = "", time.monotonic()
    while True:
        found = _status(name)
        if found is not None:
            if found.status is ApplicationStatus.RUNNING:
                break
            if found.status is ApplicationStatus.DEPLOY_FAILED:
                raise ResourceError(f"the model could not be deployed: {cause(found)}")
            words = waited_for({part: one.replica_states for part, one in found.deployments.items()})
            late = time.monotonic() - spoke > _EVERY_SECONDS
            if words and (words != said or late):
                tell(f"waiting for {words}{f' ({machine_load()})' if late else ''}")
                said, spoke = words, time.monotonic()
        time.sleep(_POLL_SECONDS)
    with telling("Ray Serve's proxy", tell):
        while True:
            try:
                _get_global_client().wait_for_proxies_serving()
                return
            except TimeoutError:  # after a minute
                continue


def _status(name: str) -> ApplicationStatusOverview | None:
    """The status of an application; None as long as Serve's controller does not know it, or answers late."""
    try:
        return serve.status().applications.get(name)
    except (RayError, TimeoutError):
        return None


def waited_for(parts: Mapping[str, Mapping[Any, int]]) -> str:
    """The parts of a deployment that are not ready, in the order in which they become ready.

    Args:
        parts: Numbers of replicas of each part, by their state in Serve.
    """
    words = []
    for part, what in _WORDS.items():
        states = {str(getattr(state, "value", state)): count for state, count in parts.get(part, {}).items()}
        ready, there = states.get("RUNNING", 0), sum(states.values()) - states.get("STOPPING", 0)
        if part in parts and ready < max(1, there):
            words.append(what if max(1, there) == 1 else f"{what} ({ready} of {there})")
    return ", ".join(words)


def cause(status: ApplicationStatusOverview) -> str:
    """The error of the replicas, from the tracebacks in Serve's status."""
    told = "\n".join([status.message, *(part.message for part in status.deployments.values())])
    ours = re.findall(r"^(?:ray::.*)?errors\.\w+: (.+)$", told, flags=re.MULTILINE)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return str(ours[-1] if ours else lines[-1] if lines else "Ray Serve gives no reason")


__all__ = ["cause", "deploy", "start_serve", "waited_for"]
