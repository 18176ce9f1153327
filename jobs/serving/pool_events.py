"""Events of a deployment without a coordinator, from its pool."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from errors import ChannelError
from jobs.serving.names import POOL

_CALL_SECONDS = 1.0  # the command's end may have to wait for one call


class PoolEvents:
    """Asks the pool of a deployment for its events; an `EventSource`.

    Each question is a short call, since Ray Serve does not end a deployment that has a running call.

    Args:
        application: Name of the Serve application.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: DeploymentHandle | None = None
        self._run, self._known = "", 0

    def events(self) -> list[dict[str, Any]]:
        """The events that have not been returned before, oldest first.

        Raises:
            ChannelError: The pool does not answer.
        """
        try:
            if self._handle is None:
                self._handle = serve.get_deployment_handle(POOL, self._application)
            answer = self._handle.events.remote(self._run, self._known)
            try:
                self._run, self._known, events = answer.result(timeout_s=_CALL_SECONDS)
            except TimeoutError:
                answer.cancel()
                raise
        except (TimeoutError, RayError, RayServeException) as error:
            raise ChannelError(f"the pool of {self._application!r} does not answer: {error}") from error
        return [asdict(event) for event in events]


__all__ = ["PoolEvents"]
