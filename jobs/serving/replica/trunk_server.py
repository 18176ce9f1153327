"""The gRPC service of a trunk replica: sends the engine's deltas, one message for each step."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import grpc

from channels.grpc import tls
from channels.grpc.options import MAX_STREAMS, OPTIONS
from engine.delta import Delta
from engine.service import EngineService
from errors import ConfigError, QueueFull, RaymoeError, ResourceError, described
from jobs.serving.replica.held_leases import HeldLeases
from jobs.serving.trunk_messages import delta_message, sampling_params
from protos import trunk_pb2_grpc
from protos.trunk_pb2 import TrunkDelta, TrunkRequest, TrunkStatus, TrunkStatusRequest

log = logging.getLogger(__name__)


class TrunkService(trunk_pb2_grpc.TrunkServicer):
    """The service of trunk.proto, from one engine.

    Args:
        service: Runs the engine.
        leases: The leases on this replica.
        status: Returns the replica's status; with True it also asks the expert hosts, which may take seconds.
    """

    def __init__(
        self, service: EngineService, leases: HeldLeases, status: Callable[[bool], TrunkStatus]
    ) -> None:
        self._service, self._leases, self._status = service, leases, status
        self._loop = asyncio.get_running_loop()
        self._heard: deque[tuple[asyncio.Queue[Delta], Delta]] = deque()
        self._waking = False
        self.closing = False

    async def Generate(  # type: ignore[override]  # the stubs know only generators
        self, request: TrunkRequest, context: Any
    ) -> None:
        with self._leases.using(request.lease):
            try:
                async for message in self._deltas(request):
                    await context.write(message)
            except QueueFull as error:
                _end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            except ConfigError as error:
                _end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except ResourceError as error:
                _end(context, grpc.StatusCode.UNAVAILABLE, str(error))
            except Exception as error:  # of this request alone: another replica would fail, too
                log.exception("request %s failed", request.id)
                _end(context, grpc.StatusCode.ABORTED, described(error))

    async def Status(self, request: TrunkStatusRequest, context: Any) -> TrunkStatus:
        if request.health:
            return await asyncio.to_thread(self._status, True)
        return self._status(False)

    def close(self) -> None:
        """Answer requests that end with an error from now on so that another replica continues them."""
        self.closing = True

    async def _deltas(self, request: TrunkRequest) -> AsyncGenerator[TrunkDelta, None]:
        """An empty message when the engine has accepted the request, then all deltas that are ready.

        Raises:
            ConfigError, QueueFull: The engine refuses the request.
            ResourceError: This replica ends.
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
                if self.closing and ready[-1].error is not None and not ready[-1].own:
                    raise ResourceError("this replica ends")
                yield delta_message(ready)
        finally:
            if not over:
                with suppress(RaymoeError):  # the service is closed, and has no requests
                    self._service.cancel(request.id)

    def _hear(self, deltas: asyncio.Queue[Delta], delta: Delta) -> None:
        """Queue a delta in the engine's thread; wake the event loop once for a step's deltas if possible."""
        self._heard.append((deltas, delta))
        if not self._waking:
            self._waking = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._waking = False  # first, so that a delta from now on wakes the loop again
        while self._heard:
            deltas, delta = self._heard.popleft()
            deltas.put_nowait(delta)


def _end(context: Any, code: grpc.StatusCode, details: str) -> None:
    """Set the status of a call that returns now.

    `context.abort` raises an exception that the library (grpcio 1.85) keeps for good, with the request.
    """
    context.set_code(code)
    context.set_details(details)


class TrunkServer:
    """The service on a port that the system chooses; made and used in one event loop.

    Args:
        service: The service.
        host: The network interface to listen on.

    Raises:
        ResourceError: The interface cannot be listened on.
    """

    def __init__(self, service: TrunkService, *, host: str) -> None:
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=MAX_STREAMS)
        trunk_pb2_grpc.add_TrunkServicer_to_server(service, self._server)
        try:
            port = tls.listen(self._server, f"{host}:0")
        except RuntimeError as error:
            raise ResourceError(
                f"cannot listen on {host}; cluster.interface has to be an address of this machine, and its "
                "ports free"
            ) from error
        self.address = f"{host}:{port}"

    async def start(self) -> None:
        """Start to accept calls."""
        await self._server.start()


__all__ = ["TrunkServer", "TrunkService"]
