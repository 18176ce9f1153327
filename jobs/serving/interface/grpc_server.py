"""The gRPC server of a process of the interface: generation, health and server reflection."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from errors import ResourceError
from jobs.api.backend import Backend
from jobs.api.grpc_guard import SERVER_OPTIONS, StrangerGuard
from jobs.serving.interface.grpc_methods import GrpcMethods
from protos.generation_pb2 import DESCRIPTOR
from protos.generation_pb2_grpc import add_GenerationServicer_to_server

_MAX_CALLS = 4096
_SERVICES = (
    *(service.full_name for file in (DESCRIPTOR, HEALTH) for service in file.services_by_name.values()),
    reflection.SERVICE_NAME,
)


class InterfaceServer:
    """A server on a port that all processes of the interface share; made and used in one event loop.

    Args:
        backend: The served model.
        address: Host and port.

    Raises:
        ResourceError: The address cannot be listened on.
    """

    def __init__(self, backend: Backend, address: str) -> None:
        self._server = grpc.aio.server(
            options=(*SERVER_OPTIONS, ("grpc.so_reuseport", 1)),
            interceptors=[StrangerGuard(backend.keys)],
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        methods = GrpcMethods(backend)
        add_GenerationServicer_to_server(methods, self._server)
        add_HealthServicer_to_server(methods, self._server)
        reflection.enable_server_reflection(_SERVICES, self._server)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ResourceError(f"--grpc-port: {address} cannot be listened on: {error}") from error
        self._stopped: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to accept calls."""
        await self._server.start()

    async def stop(self) -> None:
        """Close the port and all connections; calls that are left are cancelled."""
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._server.stop(None))
        await asyncio.shield(self._stopped)


__all__ = ["InterfaceServer"]
