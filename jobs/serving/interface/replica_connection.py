"""A gRPC connection to one replica of the trunk, which finds out when the replica is gone or hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import grpc

from channels.grpc import tls
from channels.grpc.options import OPTIONS
from errors import ChannelError, ConfigError, QueueFull, RequestFailed
from protos.trunk_pb2 import TrunkDelta, TrunkRequest, TrunkStatus, TrunkStatusRequest
from protos.trunk_pb2_grpc import TrunkStub

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_LOOKS = 4  # checks within `dead_after`


class ReplicaConnection:
    """A connection to one replica; used in one event loop.

    Args:
        address: Address of the replica.
        dead_after: Seconds without an answer after which the replica counts as dead.

    Attributes:
        used: When the last request ended, by `time.monotonic`.
        lost: Why the connection is of no use any more; None while it works.
    """

    def __init__(self, address: str, *, dead_after: float) -> None:
        self.address = address
        self.used = time.monotonic()
        self.lost: str | None = None
        self._dead_after = dead_after
        self._channel = tls.dial_async(address, OPTIONS)
        self._stub: Any = TrunkStub(self._channel)
        self._calls: set[Any] = set()
        self._heard = time.monotonic()
        self._watching: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether no request uses the connection."""
        return not self._calls

    async def generate(self, request: TrunkRequest) -> AsyncGenerator[TrunkDelta, None]:
        """The replica's messages, the first of which is empty; closing the generator cancels the call.

        Raises:
            ChannelError: The replica is gone or hangs, and the request has not ended.
            ConfigError, QueueFull: The replica refuses the request.
            RequestFailed: The request failed at the replica, as it would at another one.
        """
        call = self._stub.Generate(request)
        self._calls.add(call)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        try:
            while (message := await call.read()) is not _EOF:
                self._heard = time.monotonic()
                yield message
            raise ChannelError(f"{self.address} ended a request without its end")
        except grpc.aio.AioRpcError as error:
            kinds = {
                grpc.StatusCode.INVALID_ARGUMENT: ConfigError,
                grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
                grpc.StatusCode.ABORTED: RequestFailed,
            }
            if error.code() in kinds:
                raise kinds[error.code()](error.details()) from None
            raise ChannelError(f"{self.address} ({error.code().name}): {error.details()}") from None
        except asyncio.CancelledError:
            self._raise_if_ours()
            raise
        finally:
            call.cancel()
            self._calls.discard(call)
            self.used = time.monotonic()

    async def status(self, *, health: bool = False, timeout: float | None = None) -> TrunkStatus:
        """The replica's status.

        Args:
            health: Also ask the expert hosts.
            timeout: Seconds to wait; None waits `dead_after`.

        Raises:
            ChannelError: The replica does not answer.
        """
        try:
            status: TrunkStatus = await self._stub.Status(
                TrunkStatusRequest(health=health), timeout=timeout or self._dead_after
            )
        except grpc.aio.AioRpcError as error:
            raise ChannelError(f"{self.address} ({error.code().name}): {error.details()}") from None
        except asyncio.CancelledError:
            self._raise_if_ours()
            raise
        self._heard = time.monotonic()
        return status

    async def close(self) -> None:
        """Close the connection."""
        self.lost = self.lost or f"the connection to {self.address} is closed"
        if self._watching is not None:
            self._watching.cancel()
        await self._channel.close(None)

    def _raise_if_ours(self) -> None:
        """Raise `ChannelError` if this connection cancelled the call, because its replica is lost."""
        task = asyncio.current_task()
        if self.lost is not None and not (task is not None and task.cancelling()):
            raise ChannelError(self.lost) from None

    async def _watch(self) -> None:
        """While requests run, ask a silent replica for its status; cancel them if it does not answer."""
        while self._calls:
            await asyncio.sleep(self._dead_after / _LOOKS)
            if time.monotonic() - self._heard < self._dead_after / _LOOKS:
                continue
            try:
                await self.status()
            except Exception as error:  # an unforeseen one too: without a watch the calls could wait for ever
                what = str(error) if isinstance(error, ChannelError) else f"{self.address}: {error!r}"
                self.lost = f"the trunk's replica at {what}"
                for call in list(self._calls):
                    with suppress(Exception):
                        call.cancel()
                return


__all__ = ["ReplicaConnection"]
