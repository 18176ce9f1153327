"""Which replica of the trunk takes a request: Ray Serve says, and counts it there until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_ASK_AGAIN_SECONDS = 1.0  # a replica that hangs may have been asked
_ASKED_AT_MOST = 3
_RETRY_SECONDS = 0.05


class ServeRoutes:
    """As Serve's own router picks them, by their load.

    Args:
        trunk: handle of the deployment.
    """

    def __init__(self, trunk: DeploymentHandle) -> None:
        self._hold = trunk.options(stream=True).hold

    async def take(self, name: str) -> tuple[str, object]:
        """See `jobs.serving.trunks.Routes`."""
        asked: set[asyncio.Task[tuple[str, object]]] = set()
        try:
            while True:
                if len(asked) < _ASKED_AT_MOST:
                    asked.add(asyncio.create_task(self._ask(name)))
                done, asked = await asyncio.wait(
                    asked, timeout=_ASK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                for one in done:
                    if one.exception() is None:
                        return one.result()
                if done:  # of a replica that is gone; Serve has heard of it with this
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            for one in asked:
                one.cancel()

    async def _ask(self, name: str) -> tuple[str, object]:
        lease: AsyncIterator[Any] = self._hold.remote(name)
        try:
            return await anext(lease), lease
        except asyncio.CancelledError:
            lease.cancel()  # type: ignore[attr-defined]
            raise


__all__ = ["ServeRoutes"]
