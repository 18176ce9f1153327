"""Which replica of the trunk takes a request: Ray Serve says, and counts it there until it has ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from jobs.serving.interface.trunks import Lease

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_ASK_AGAIN_SECONDS = 1.0  # a replica that hangs may have been asked
_ASKED_AT_MOST = 3
_RETRY_SECONDS = 0.05
_REUSE_SECONDS = 0.5  # well below what a replica keeps a lease open for
_LONGEST_SECONDS = 10.0  # so that Serve is asked again: its replicas change


class ServeRoutes:
    """As Serve's own router picks replicas, by their load.

    A call to Serve takes some milliseconds. A request that comes soon after another one has ended goes
    without, to where that one was: there is room now.

    Args:
        trunk: handle of the deployment.
        clock: seconds.
    """

    def __init__(self, trunk: DeploymentHandle, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._hold = trunk.options(stream=True).hold
        self._clock = clock
        self._free: list[tuple[float, Lease]] = []

    async def take(self) -> Lease:
        """See `jobs.serving.interface.trunks.Routes`."""
        now = self._clock()
        while self._free:
            since, lease = self._free.pop()
            if now - since > _REUSE_SECONDS:
                self._free.clear()  # the others have been free for longer
            elif now - lease.began <= _LONGEST_SECONDS:
                return lease
        return await self._ask_serve()

    def give_back(self, lease: Lease) -> None:
        """See `jobs.serving.interface.trunks.Routes`."""
        if lease.call is not None:  # else Serve does not count this request, and should count the next one
            self._free.append((self._clock(), lease))

    def lost(self, lease: Lease) -> None:
        """See `jobs.serving.interface.trunks.Routes`."""
        self._free = [one for one in self._free if one[1].address != lease.address]

    async def _ask_serve(self) -> Lease:
        asked: list[asyncio.Task[Lease]] = []  # oldest first
        try:
            while True:
                if len(asked) == _ASKED_AT_MOST:  # all of them may have come to the same replica, which hangs
                    asked.pop(0).cancel()
                asked.append(asyncio.create_task(self._ask_once()))
                done, _ = await asyncio.wait(
                    asked, timeout=_ASK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                asked = [one for one in asked if one not in done]
                for one in done:
                    if one.exception() is None:
                        return one.result()
                if done:  # of a replica that is gone; Serve has heard of it with this
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            for one in asked:
                one.cancel()

    async def _ask_once(self) -> Lease:
        name = uuid.uuid4().hex
        call: AsyncIterator[Any] = self._hold.remote(name)
        try:
            address = await anext(call)
        except asyncio.CancelledError:
            call.cancel()  # type: ignore[attr-defined]
            raise
        return Lease(name=name, address=address, began=self._clock(), call=call)


__all__ = ["ServeRoutes"]
