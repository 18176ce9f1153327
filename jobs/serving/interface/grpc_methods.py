"""The interface's gRPC methods: generation and health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)
from grpc_health.v1.health_pb2_grpc import HealthServicer

from jobs.api.api_errors import ApiError
from jobs.api.backend import Backend
from jobs.api.grpc_generation import generate
from jobs.api.grpc_guard import CallRefused
from protos.generation_pb2 import DESCRIPTOR, GenerateReply, GenerateRequest
from protos.generation_pb2_grpc import GenerationServicer

_NAME = DESCRIPTOR.services_by_name["Generation"].full_name
_SERVICE_NAMES = ("", _NAME)  # the empty name stands for the whole server
_WATCH_SECONDS = 1.0
_FRESH_SECONDS = 0.25
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class GrpcMethods(GenerationServicer, HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """gRPC methods over a backend; keys are checked before a message is read, by the server.

    Args:
        backend: The served model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._asked: asyncio.Task[HealthCheckResponse] | None = None
        self._asked_at = 0.0

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncGenerator[GenerateReply, None]:
        """Generate, as generation.proto describes."""
        # A cancelled call closes this generator, which ends the generation.
        with _refusing():
            async with aclosing(generate(self._backend, request)) as replies:
                async for reply in replies:
                    yield reply

    async def Check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:
        """Whether requests can be answered, as in `GET /health`."""
        with _refusing():
            if request.service not in _SERVICE_NAMES:
                raise ApiError(404, f"there is no such service; ask for {_NAME!r} or none")
            return await self._health()

    async def List(self, request: HealthListRequest, context: Any) -> HealthListResponse:
        """The health of every service."""
        health = await self._health()
        return HealthListResponse(statuses=dict.fromkeys(_SERVICE_NAMES, health))

    async def Watch(
        self, request: HealthCheckRequest, context: Any
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """The health now and after each change."""
        known = request.service in _SERVICE_NAMES
        last: HealthCheckResponse | None = None
        while True:
            health = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
            if known:
                health = await self._health()
            if health != last:
                yield health
            last = health
            await asyncio.sleep(_WATCH_SECONDS)

    async def _health(self) -> HealthCheckResponse:
        """The health; all who ask at about the same time share one question to the replicas."""
        now = time.monotonic()
        if self._asked is None or (self._asked.done() and now - self._asked_at > _FRESH_SECONDS):
            self._asked, self._asked_at = asyncio.create_task(self._ask()), now
        return await asyncio.shield(self._asked)

    async def _ask(self) -> HealthCheckResponse:
        good, bad = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
        serves = not self._backend.admission.closed and await self._backend.health() is None
        return HealthCheckResponse(status=good if serves else bad)


@contextmanager
def _refusing() -> Iterator[None]:
    """Make a status of an `ApiError`.

    Raises:
        CallRefused: In place of the `ApiError`.
    """
    try:
        yield
    except ApiError as error:
        named = error.param is None or error.message.startswith(error.param)
        details = error.message if named else f"{error.param}: {error.message}"
        raise CallRefused(_CODES.get(error.status, grpc.StatusCode.INTERNAL), details) from None


__all__ = ["GrpcMethods"]
