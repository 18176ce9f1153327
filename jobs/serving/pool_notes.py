"""Lines of a deployment's processes that become events of its pool, where its operator sees them."""

from __future__ import annotations

import asyncio

from ray.serve.handle import DeploymentHandle

from jobs.console import say

_TRIES = 30
_RETRY_SECONDS = 1.0
_CALL_SECONDS = 10.0


class PoolNotes:
    """Gives the pool lines to record; made in the event loop that sends them.

    Args:
        pool: Handle of the pool's deployment.
    """

    def __init__(self, pool: DeploymentHandle) -> None:
        self._pool = pool.options(_by_reference=False)  # as in `PoolLink`
        self._loop = asyncio.get_running_loop()
        self._sending: set[asyncio.Task[None]] = set()

    def tell(self, kind: str, text: str) -> None:
        """Write a line to the log of this process, and have the pool record it; called in any thread.

        Args:
            kind: Kind of the event.
            text: What happened.
        """
        say(f"{kind}: {text}")
        self._loop.call_soon_threadsafe(self._begin, kind, text)

    def _begin(self, kind: str, text: str) -> None:
        task = self._loop.create_task(self._send(kind, text))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, kind: str, text: str) -> None:
        for _ in range(_TRIES):
            try:
                await asyncio.wait_for(self._pool.note.remote(kind, text), _CALL_SECONDS)
            except Exception:  # the pool is restarting
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return


__all__ = ["PoolNotes"]
