"""Leases on trunk replicas: Ray Serve names a replica, and counts the request there until it has ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_ASK_AGAIN_SECONDS = 1.0  # Serve may have chosen a replica that hangs
_ASKED_AT_MOST = 3
_LONGEST_PATIENCE = 8  # times the first one: a deployment without replicas is not flooded with questions
_RETRY_SECONDS = 0.05
_REUSE_SECONDS = 0.5  # well below the time for which a replica keeps a lease open
_LONGEST_SECONDS = 10.0  # after which Serve is asked again, because its replicas change


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaLease:
    """The right to use a replica for one request at a time.

    Attributes:
        name: Name of the lease at the replica.
        address: Address of the replica's gRPC service.
        began: When the lease was given, by the clock of its source.
        call: Serve's call, kept as long as the lease is used; None if Serve does not count the request.
    """

    name: str
    address: str
    began: float
    call: object = None


class LeaseSource(Protocol):
    """Gives leases on replicas."""

    async def take(self) -> ReplicaLease:
        """A lease for one request, as soon as there is a replica."""
        ...

    def give_back(self, lease: ReplicaLease) -> None:
        """End the use of a lease whose request has ended."""
        ...

    def lost(self, lease: ReplicaLease) -> None:
        """Discard the leases on a replica that is gone or hangs."""
        ...


class ServeLeases:
    """Leases on the replicas that Ray Serve's router picks by their load.

    A call to Serve takes some milliseconds. A request that comes soon after another one has ended takes over
    its lease, since that replica has room again.

    Args:
        trunk: Handle of the deployment.
        clock: Seconds, monotonic.
    """

    def __init__(self, trunk: DeploymentHandle, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._hold = trunk.options(stream=True).hold
        self._clock = clock
        self._free: list[tuple[float, ReplicaLease]] = []

    async def take(self) -> ReplicaLease:
        now = self._clock()
        while self._free:
            since, lease = self._free.pop()
            if now - since > _REUSE_SECONDS:
                self._free.clear()  # the others have been free for longer
            elif now - lease.began <= _LONGEST_SECONDS:
                return lease
        return await self._ask_serve()

    def give_back(self, lease: ReplicaLease) -> None:
        if lease.call is not None:  # a request without a call is not counted by Serve; the next one should be
            self._free.append((self._clock(), lease))

    def lost(self, lease: ReplicaLease) -> None:
        self._free = [one for one in self._free if one[1].address != lease.address]

    async def _ask_serve(self) -> ReplicaLease:
        asked: list[asyncio.Task[ReplicaLease]] = []  # oldest first
        patience = _ASK_AGAIN_SECONDS
        try:
            while True:
                if not any(one.done() for one in asked):
                    if len(asked) == _ASKED_AT_MOST:  # all of them may have reached one replica, which hangs
                        asked.pop(0).cancel()
                        patience = min(2 * patience, _LONGEST_PATIENCE * _ASK_AGAIN_SECONDS)
                    asked.append(asyncio.create_task(self._ask_once()))
                done, _ = await asyncio.wait(asked, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                asked = [one for one in asked if one not in done]
                for one in done:
                    if one.exception() is None:
                        return one.result()
                if done:  # the replica is gone, and with this answer Serve knows it
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            for one in asked:
                one.cancel()

    async def _ask_once(self) -> ReplicaLease:
        name = uuid.uuid4().hex
        call: AsyncIterator[Any] = self._hold.remote(name)
        try:
            address = await anext(call)
        except asyncio.CancelledError:
            call.cancel()  # type: ignore[attr-defined]
            raise
        return ReplicaLease(name=name, address=address, began=self._clock(), call=call)


__all__ = ["LeaseSource", "ReplicaLease", "ServeLeases"]
