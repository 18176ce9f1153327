"""Deploys an application with Ray Serve, and says what it waits for."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, RayActorError, RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from errors import ResourceError
from jobs.fleet.waiting import Tell, machine_load, telling
from jobs.serving.names import FRONT, INTERFACE, POOL, TRUNK

_START_TRIES = 5
_POLL_SECONDS = 0.2
_EVERY_SECONDS = 10.0
_GONE_SECONDS = 10.0  # that an application is absent, or its controller dead, before it is given up
_ABSENT = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING)
_CONTROLLER = "Ray Serve's controller"
_ENDED = "Ray Serve has ended meanwhile; start the command again"
_WORDS = {
    POOL: "coordinator and expert hosts",
    TRUNK: "trunk replicas",
    INTERFACE: "interface",
    FRONT: "front",
}


def running_http_port() -> int | None:
    """Port of the HTTP proxy of a Ray Serve that runs on the cluster; None if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else int(client.http_config.port)


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
        ResourceError: A part failed, and the message is its error; or the application was deleted meanwhile.
    """
    target = serve.RunTarget(target=application, name=name, route_prefix="/")
    with suppress(TimeoutError):  # of the proxies, which are waited for below
        serve.run_many(
            [target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False
        )
    progress = _DeploymentProgress(name, tell)
    while not progress.complete():
        time.sleep(_POLL_SECONDS)
    with telling("Ray Serve's proxy", tell):
        while True:
            try:
                _get_global_client().wait_for_proxies_serving()
                return
            except TimeoutError:  # after a minute
                continue
            except (RayActorError, RayServeException) as error:
                raise ResourceError(_ENDED) from error


class _DeploymentProgress:
    """The progress of an application that is deployed, which it tells.

    Args:
        name: Name of the application in Serve.
        tell: Shows what is waited for.
    """

    def __init__(self, name: str, tell: Tell) -> None:
        self._name, self._tell = name, tell
        self._said = ""
        self._spoke = time.monotonic()
        self._seen = False
        self._gone_since: float | None = None

    def complete(self) -> bool:
        """Whether the application runs now.

        Raises:
            ResourceError: It failed or was deleted, or Serve's controller has ended.
        """
        try:
            with telling(_CONTROLLER, self._tell):  # Ray waits without limit for a controller that restarts
                found = serve.status().applications.get(self._name)
        except ActorDiedError as error:
            if self._gone():
                raise ResourceError(_ENDED) from error
            return False
        except (RayError, TimeoutError):
            self._gone_since = None  # nothing is known
            self._say(_CONTROLLER)
            return False
        if found is None or found.status in _ABSENT:
            if self._gone():
                what = "was deleted meanwhile" if self._seen else "is not known to Ray Serve"
                raise ResourceError(f"the Serve application {self._name!r} {what}; start it again")
            return False
        if found.status is ApplicationStatus.DEPLOY_FAILED:
            raise ResourceError(f"the model could not be deployed: {cause(found)}")
        self._seen, self._gone_since = True, None
        self._say(waited_for({part: one.replica_states for part, one in found.deployments.items()}))
        return found.status is ApplicationStatus.RUNNING

    def _gone(self) -> bool:
        """Whether the application has been gone for some seconds, as it is now."""
        if self._gone_since is None:
            self._gone_since = time.monotonic()
        return time.monotonic() - self._gone_since > _GONE_SECONDS

    def _say(self, words: str) -> None:
        """Tell what is waited for: new parts at once, the same ones and the controller every few seconds."""
        late = time.monotonic() - self._spoke > _EVERY_SECONDS
        if words and (late or words not in (self._said, _CONTROLLER)):
            self._tell(f"waiting for {words}{f' ({machine_load()})' if late else ''}")
            self._said, self._spoke = words, time.monotonic()


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


__all__ = ["cause", "deploy", "running_http_port", "start_serve", "waited_for"]
