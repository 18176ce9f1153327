"""The interface's gRPC methods, generation and health, which Serve's proxy calls by name.

Serve registers the services in `SERVICES` and answers server reflection itself. The client gets the status
code that a method sets on the context before it raises an error.
"""

from __future__ import annotations

import asyncio
import ipaddress
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

import grpc
from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from errors import RaymoeError
from jobs.api.api_errors import ApiError
from jobs.api.backend import Backend
from jobs.api.grpc_generation import generate
from protos.generation_pb2 import DESCRIPTOR, GenerateReply, GenerateRequest

if TYPE_CHECKING:
    from ray.serve.grpc_util import RayServegRPCContext

SERVICES = [
    "protos.generation_pb2_grpc.add_GenerationServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
"""Value of Serve's option `grpc_options.grpc_servicer_functions`."""

_NAME = DESCRIPTOR.services_by_name["Generation"].full_name
_SERVICE_NAMES = ("", _NAME)  # the empty name stands for the whole server
_WATCH_SECONDS = 1.0
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class GrpcMethods:
    """gRPC methods of a deployment with a `backend`; `_loopback` refuses calls from other machines."""

    _loopback: bool

    @property
    @abstractmethod
    def backend(self) -> Backend:
        """The served model."""

    async def Generate(
        self, request: GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[GenerateReply, None]:
        """Generate, as generation.proto describes."""
        with self._refusing(grpc_context):
            metadata = dict(grpc_context.invocation_metadata())
            # A cancelled call closes this generator, which ends the generation.
            async with aclosing(generate(self.backend, request, metadata.get("authorization"))) as replies:
                async for reply in replies:
                    yield reply

    async def Check(
        self, request: HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> HealthCheckResponse:
        """Whether requests can be answered, as in `GET /health`."""
        with self._refusing(grpc_context):
            if request.service not in _SERVICE_NAMES:
                raise ApiError(404, f"there is no service {request.service!r}; ask for {_NAME!r} or none")
            return await self._health()

    async def List(self, request: HealthListRequest, grpc_context: RayServegRPCContext) -> HealthListResponse:
        """The health of every service."""
        with self._refusing(grpc_context):
            health = await self._health()
            return HealthListResponse(statuses=dict.fromkeys(_SERVICE_NAMES, health))

    async def Watch(
        self, request: HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """The health now and after each change."""
        with self._refusing(grpc_context):
            last: HealthCheckResponse | None = None
            while True:
                health = await self._health()
                if request.service not in _SERVICE_NAMES:
                    health = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
                if health != last:
                    yield health
                last = health
                await asyncio.sleep(_WATCH_SECONDS)

    async def _health(self) -> HealthCheckResponse:
        good, bad = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
        serves = not self.backend.admission.closed and await self.backend.health() is None
        return HealthCheckResponse(status=good if serves else bad)

    @contextmanager
    def _refusing(self, context: RayServegRPCContext) -> Iterator[None]:
        """Set the status of an `ApiError` on the context, around the body of a method.

        Raises:
            RaymoeError: In place of the `ApiError`; Serve sends the context's code and details.
        """
        try:
            if self._loopback and not on_this_machine(context.peer()):
                raise ApiError(
                    403, "this server takes calls from its own machine; start it with --host 0.0.0.0"
                )
            yield
        except ApiError as error:
            context.set_code(_CODES.get(error.status, grpc.StatusCode.INTERNAL))
            named = error.param is None or error.message.startswith(error.param)
            details = error.message if named else f"{error.param}: {error.message}"
            context.set_details(details)
            raise RaymoeError(details) from None


def on_this_machine(peer: str) -> bool:
    """Whether a call came over the loopback.

    Args:
        peer: The peer in gRPC's notation: `ipv4:127.0.0.1:4242`, `ipv6:[::1]:4242`, `unix:…`.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind == "unix":
        return True
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


__all__ = ["SERVICES", "GrpcMethods", "on_this_machine"]
