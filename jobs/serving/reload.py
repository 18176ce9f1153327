"""`raymoe reload`: replaces the weights of a served model without interrupting it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from errors import RaymoeError, ResourceError
from jobs.checkpoints.checkpoint_store import find_weights
from jobs.fleet.ray_address import only_address
from jobs.fleet.ray_session import ResourceNeeds, ray_session
from jobs.serving.names import POOL

_ALIVE = (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY, ApplicationStatus.DEPLOYING)


def reload(checkpoint: Path, *, address: str | None, name: str, debug: bool = False) -> dict[str, Any]:
    """Change a deployment to another checkpoint; returns when every replica uses it.

    Args:
        checkpoint: The checkpoint, a run's directory, or a Hugging Face directory.
        address: Address of the Ray cluster; None takes RAY_ADDRESS, or without it the only cluster of this
            machine.
        name: Name of the Serve application.
        debug: Show the output of actors.

    Returns:
        The result of `ExpertPool.reload`.

    Raises:
        RaymoeError: There is no such deployment, or the checkpoint does not fit; the old weights stay in use.
    """
    directory = find_weights(checkpoint).resolve()
    if not debug:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    address = only_address(address)
    with ray_session(ResourceNeeds(cpus=0, why=""), address=address, debug=debug):
        found = serve.status().applications.get(name)
        if found is None or found.status not in _ALIVE:
            what = "is not there" if found is None else f"is {found.status.value}"
            raise ResourceError(
                f"the Serve application {name!r} {what} on the Ray cluster at {address}; check --app and "
                "--address"
            )
        try:
            done: dict[str, Any] = (
                serve.get_deployment_handle(POOL, name).reload.remote(str(directory)).result()
            )
        except RayTaskError as error:
            if isinstance(error.cause, RaymoeError):
                raise error.cause from None
            raise RaymoeError(f"the reload failed: {type(error.cause).__name__}: {error.cause}") from None
        except (RayError, RayServeException) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RaymoeError(f"the deployment {name!r} does not answer: {first}") from None
    return done


__all__ = ["reload"]
