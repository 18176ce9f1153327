"""The change of a served model's weights without interrupting it, in a session of its Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from errors import RaymoeError
from jobs.serving.names import INTERFACE, POOL, TRUNK

_ALIVE = (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY, ApplicationStatus.DEPLOYING)
_ASK_SECONDS = 10.0


def served_applications() -> dict[str, str]:
    """Names of the Serve applications that serve a model; the state of those that do not run, else empty."""
    return {
        name: "" if found.status in _ALIVE else found.status.value
        for name, found in serve.status().applications.items()
        if {POOL, TRUNK, INTERFACE} <= set(found.deployments)
    }


def coordinator_of(application: str) -> str | None:
    """Address of an application's coordinator; None if it has no expert hosts.

    Raises:
        RaymoeError: Its pool does not answer.
    """
    try:
        handle = serve.get_deployment_handle(POOL, application)
        address: str | None = handle.where.remote().result(timeout_s=_ASK_SECONDS)
    except TimeoutError:
        raise RaymoeError(f"the deployment {application!r} does not answer") from None
    except (RayError, RayServeException) as error:
        raise _no_answer(application, error) from None
    return address


def reload(directory: Path, *, application: str) -> dict[str, Any]:
    """Change a deployment to another checkpoint; returns when every replica uses it.

    Args:
        directory: A directory with weights, as `find_weights` names it.
        application: Name of the Serve application.

    Returns:
        The result of `ExpertPool.reload`.

    Raises:
        RaymoeError: The checkpoint does not fit, and the old weights stay in use; or there is no answer.
    """
    try:
        handle = serve.get_deployment_handle(POOL, application)
        done: dict[str, Any] = handle.reload.remote(str(directory)).result()
    except RayTaskError as error:
        if isinstance(error.cause, RaymoeError):
            raise error.cause from None
        raise RaymoeError(f"the reload failed: {type(error.cause).__name__}: {error.cause}") from None
    except (RayError, RayServeException) as error:
        raise _no_answer(application, error) from None
    return done


def _no_answer(application: str, error: Exception) -> RaymoeError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RaymoeError(f"the deployment {application!r} does not answer: {first}")


__all__ = ["coordinator_of", "reload", "served_applications"]
