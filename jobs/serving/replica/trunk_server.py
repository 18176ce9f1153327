"""A trunk replica's gRPC service: the engine's deltas, a message for each step, to whoever asks for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from channels.grpc import tls
from channels.grpc.channel import MAX_STREAMS, OPTIONS
from engine.service import Delta, EngineService
from errors import ConfigError, QueueFull, RaymoeError, ResourceError
from jobs.serving.trunk_messages import delta_message, sampling_params
from protos import trunk_pb2_grpc
from protos.trunk_pb2 import TrunkDelta, TrunkRequest, TrunkStatus, TrunkStatusRequest

_UNUSED_SECONDS = 15.0  # before a lease's first request
_IDLE_SECONDS = 1.0  # after one


@dataclass(slots=True)
class _Lease:
    requests: int = 0
    patience: float = _UNUSED_SECONDS
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Leases:
    """The calls by which Serve counts requests here: each lasts as long as a request does, and a bit longer.

    Serve counts its own calls, to balance them, to scale, and to let a replica end when it has none. So there
    is one of those for each request that is under way; one that comes soon after another takes its over.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Lease] = {}

    async def hold(self, name: str, address: str) -> AsyncGenerator[str, None]:
        """Gives the address, and lasts until no request has used the lease for a while."""
        lease = self._open.setdefault(name, _Lease())
        try:
            yield address
            while True:
                lease.changed.clear()
                async with asyncio.timeout(None if lease.requests else lease.patience):
                    await lease.changed.wait()
        except TimeoutError:
            return
        finally:
            self._open.pop(name, None)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Around a request; its lease may have ended, then Serve does not count it."""
        lease = self._open.get(name, _Lease())
        lease.requests += 1
        lease.changed.set()
        try:
            yield
        finally:
            lease.requests -= 1
            lease.patience = _IDLE_SECONDS
            lease.changed.set()


class TrunkService(trunk_pb2_grpc.TrunkServicer):
    """See trunk.proto.

    Args:
        service: generates.
        leases: of the requests to come.
        status: of the replica; asks the expert hosts when that is wanted, which may take a while.
    """

    def __init__(self, service: EngineService, leases: Leases, status: Callable[[bool], TrunkStatus]) -> None:
        self._service, self._leases, self._status = service, leases, status
        self._loop = asyncio.get_running_loop()
        self._heard: deque[tuple[asyncio.Queue[Delta], Delta]] = deque()
        self._waking = False
        self.closing = False

    async def Generate(  # type: ignore[override]  # the stubs know generators alone
        self, request: TrunkRequest, context: Any
    ) -> None:
        """See trunk.proto."""
        with self._leases.using(request.lease):
            try:
                async for message in self._deltas(request):
                    await context.write(message)
            except QueueFull as error:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            except ConfigError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except RaymoeError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def Status(self, request: TrunkStatusRequest, context: Any) -> TrunkStatus:
        """See trunk.proto."""
        if request.health:
            return await asyncio.to_thread(self._status, True)
        return self._status(False)

    def close(self) -> None:
        """Requests that are cut off from now on are to go on elsewhere."""
        self.closing = True

    async def _deltas(self, request: TrunkRequest) -> AsyncGenerator[TrunkDelta, None]:
        """An empty one when the engine has the request, then what is ready.

        Raises:
            ConfigError, QueueFull: the engine does not take it.
            RaymoeError: this replica ends.
        """
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        next_: Delta | None = None
        over = False
        try:
            submitted = self._service.submit(
                request.id,
                request.prompt,
                sampling_params(request.sampling),
                lambda delta: self._hear(deltas, delta),
                output=request.output,
                limit=request.limit if request.HasField("limit") else None,
            )
            await asyncio.wrap_future(submitted)
            yield TrunkDelta()
            while not over:
                ready, next_ = [next_ or await deltas.get()], None
                while not deltas.empty():
                    next_ = deltas.get_nowait()
                    if next_.version != ready[0].version:
                        break
                    ready.append(next_)
                    next_ = None
                over = ready[-1].finish_reason is not None or ready[-1].error is not None
                if self.closing and ready[-1].error is not None:
                    raise ResourceError("this replica ends")
                yield delta_message(ready)
        finally:
            if not over:
                with suppress(RaymoeError):  # it is closed: nothing is under way
                    self._service.cancel(request.id)

    def _hear(self, deltas: asyncio.Queue[Delta], delta: Delta) -> None:
        """In the engine's thread, which wakes the loop once for all that a step brings, where it can."""
        self._heard.append((deltas, delta))
        if not self._waking:
            self._waking = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._waking = False  # first: what is heard from now on wakes the loop again
        while self._heard:
            deltas, delta = self._heard.popleft()
            deltas.put_nowait(delta)


class TrunkServer:
    """The service on a port that the system chooses; made and used in one event loop.

    Args:
        service: what is served.
        host: the interface to listen on.

    Raises:
        ResourceError: the interface cannot be listened on.
    """

    def __init__(self, service: TrunkService, *, host: str) -> None:
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_STREAMS)
        trunk_pb2_grpc.add_TrunkServicer_to_server(service, self._server)
        try:
            port = tls.listen(self._server, f"{host}:0")
        except RuntimeError as error:
            raise ResourceError(f"cannot listen on {host}: {error}") from error
        self.address = f"{host}:{port}"

    async def start(self) -> None:
        """Listen."""
        await self._server.start()


__all__ = ["Leases", "TrunkServer", "TrunkService"]
