"""The end of a deployment: no request is cut off, and none is told that there is no such path.

Serve removes an application's route at once when it is deleted, and its proxy then answers 404 for as long
as the replicas take to end. So the interface refuses requests first, with status 503; when those in progress
have been answered, the proxy ends and its ports close; then everything else ends.
"""

from __future__ import annotations

import time
from contextlib import suppress

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from ray.util import list_named_actors

from jobs.console import say
from jobs.serving.deployment import GRACE_SECONDS
from jobs.serving.names import POOL

_PROXY = "SERVE_PROXY_ACTOR"  # begins the names of Serve's proxies
_LEAVING_SECONDS = 0.5  # until the last bytes of an answer have left the proxy
_PROXY_SECONDS = 5.0
_SERVING = (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY)


def _drain(application: str) -> None:
    """Have the interface of an application refuse requests, and wait until those in progress have ended.

    They have `GRACE_SECONDS`. An application that has not started has none, and those of an application whose
    pool does not answer cannot end well, which is said.
    """
    try:
        found = ray_serve.status().applications.get(application)
        if found is None or found.status not in _SERVING:
            return
        ray_serve.get_deployment_handle(POOL, application).close.remote().result(timeout_s=GRACE_SECONDS)
        time.sleep(_LEAVING_SECONDS)
    except Exception as error:  # of Ray, Serve or the pool; whatever it is, the rest has to end
        why = str(error).strip().splitlines()
        say(f"requests in progress may be cut off ({why[0] if why else type(error).__name__})")


def take_down(application: str, *, whole: bool) -> None:
    """End an application, after the requests in progress; a second Ctrl-C ends it without waiting for them.

    Args:
        application: Its name.
        whole: Whether Serve ends as well, with its ports, because no other application uses it.
    """
    try:
        _drain(application)
    finally:
        if not whole:
            request_deletion(application)
    with suppress(TimeoutError):  # if the cluster stays, Serve's controller completes it
        if whole:
            _end_proxies()
            ray_serve.shutdown()
        else:
            ray_serve.delete(application)


def request_deletion(application: str) -> None:
    """Ask Serve's controller, unless it has ended, to delete an application; do not wait for that."""
    with suppress(RayError, RayServeException):
        ray_serve.delete(application, _blocking=False)


def _end_proxies() -> None:
    for named in list_named_actors(all_namespaces=True):
        if not named["name"].startswith(_PROXY):
            continue
        with suppress(RayError, ValueError):  # it has ended already
            proxy = ray.get_actor(named["name"], namespace=named["namespace"])
            ray.kill(proxy, no_restart=True)
            ray.wait([proxy.check_health.remote()], timeout=_PROXY_SECONDS)


__all__ = ["request_deletion", "take_down"]
