"""The replicas of the trunk as the interface reaches them: a connection to each, and the choice of one."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from errors import ChannelError
from jobs.serving.interface.replica_connection import ReplicaConnection
from jobs.serving.interface.replica_leases import LeaseSource, ReplicaLease
from protos.trunk_pb2 import TrunkStatus

_IDLE_SECONDS = 60.0
_RETRY_SECONDS = 0.1
_SUSPECT_SECONDS = 1.0
_SERVE_SECONDS = 1.0  # time for Serve to name a replica before the replicas themselves are asked
_SERVE_SUSPECT_SECONDS = 0.25  # the same, while some replica has not answered
_POOL_SECONDS = 0.3
_ANSWER_SECONDS = 0.1  # answers within this time are compared by load
_LONGEST_PAUSE_SECONDS = 2.0  # between two rounds of questions while no replica answers


class Replicas:
    """Connections to all replicas, and the choice of one for a request; used in one event loop.

    Args:
        leases: Names a replica for a request.
        addresses: Addresses of all replicas by name, from the pool of the deployment.
        dead_after: Seconds without an answer after which a replica counts as dead.
    """

    def __init__(
        self,
        leases: LeaseSource,
        addresses: Callable[[], Awaitable[Mapping[str, str]]],
        *,
        dead_after: float,
    ) -> None:
        self._leases, self._addresses = leases, addresses
        self._dead_after = dead_after
        self._connections: dict[str, ReplicaConnection] = {}
        self._suspects: set[str] = set()
        self._asking: asyncio.Task[dict[str, int]] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def suspects(self) -> frozenset[str]:
        """Addresses of replicas that were lost and have not answered since."""
        return frozenset(self._suspects)

    async def take(self) -> ReplicaLease:
        """A lease on the replica that Serve names, or on one that answers if Serve names none that does.

        Serve compares queue lengths that it counts itself. A replica that hangs has lost its requests, so
        its queue is the shortest of all, and Serve may name it again and again.
        """
        named = asyncio.create_task(self._named())
        pause = _SERVE_SUSPECT_SECONDS if self._suspects else _SERVE_SECONDS
        try:
            while True:
                done, _ = await asyncio.wait({named}, timeout=pause)
                if done:
                    return named.result()
                address = await self._least_loaded()
                if address is not None and not named.done():
                    name = secrets.token_hex(16)
                    return ReplicaLease(name=name, address=address, began=time.monotonic())
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        finally:
            named.cancel()

    async def _named(self) -> ReplicaLease:
        """A lease on a replica that Serve names and that is not known to hang."""
        while True:
            lease = await self._leases.take()
            if lease.address not in self._suspects:
                return lease
            try:
                await self.connection(lease.address).status(timeout=_SUSPECT_SECONDS)
            except ChannelError:
                self._leases.lost(lease)
                await asyncio.sleep(_RETRY_SECONDS)
            except asyncio.CancelledError:
                self._leases.give_back(lease)
                raise
            else:
                self._suspects.discard(lease.address)
                return lease

    async def _least_loaded(self) -> str | None:
        """Address of the least loaded replica of those that answer; None where none does within a second.

        Requests that wait at the same time share one round of questions, and count one another.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._loads())
        loads = await asyncio.shield(self._asking)
        if not loads:
            return None
        address = min(loads, key=loads.__getitem__)
        loads[address] += 1
        return address

    async def _loads(self) -> dict[str, int]:
        """Requests, running and waiting, at each replica that answers."""
        known = set(self._connections)
        with suppress(Exception):  # if the pool is away, the replicas used so far are asked
            async with asyncio.timeout(_POOL_SECONDS):
                listed = set((await self._addresses()).values())
            known |= listed
            self._suspects &= listed  # a replica that was replaced is suspected no longer
        asking = {
            asyncio.create_task(self.connection(address).status(timeout=_SUSPECT_SECONDS)): address
            for address in known
        }
        if not asking:
            return {}
        try:
            done, pending = await asyncio.wait(asking, timeout=_ANSWER_SECONDS)
            while pending and not any(one.exception() is None for one in done):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            loads = {
                asking[one]: one.result().running + one.result().waiting
                for one in done
                if one.exception() is None
            }
        finally:
            for one in asking:
                one.cancel()
        self._suspects.difference_update(loads)
        return loads

    def connection(self, address: str) -> ReplicaConnection:
        """The connection to a replica, opened again if it was lost."""
        connection = self._connections.get(address)
        if connection is None or connection.lost is not None:
            for old in list(self._connections.values()):
                if old.idle and (old.lost or time.monotonic() - old.used > _IDLE_SECONDS):
                    self._drop(old)
            connection = self._connections[address] = ReplicaConnection(address, dead_after=self._dead_after)
        return connection

    def give_back(self, lease: ReplicaLease) -> None:
        """End the use of a lease whose request has ended."""
        self._leases.give_back(lease)

    def lost(self, lease: ReplicaLease, connection: ReplicaConnection) -> None:
        """Note that a replica was lost: it is not used again before it has answered."""
        self._leases.lost(lease)
        self._suspects.add(connection.address)
        if connection.idle:
            self._drop(connection)

    def _drop(self, connection: ReplicaConnection) -> None:
        if self._connections.get(connection.address) is connection:
            del self._connections[connection.address]
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def status(self, address: str, *, health: bool = False) -> TrunkStatus:
        """The status of one replica.

        Raises:
            ChannelError: The replica does not answer.
        """
        return await self.connection(address).status(health=health)

    async def close(self) -> None:
        """Close all connections."""
        if self._asking is not None:
            self._asking.cancel()
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))


__all__ = ["Replicas"]
