"""The servers of an expert host: channels for requests, and gRPC for control calls."""

from __future__ import annotations

import os
from typing import Any

from actors.host.expert_host import ExpertHost
from actors.host.host_servicer import ExpertServicer, add_state_streams
from channels.collective import channel as collective
from channels.collective import nccl
from channels.cuda import channel as cuda
from channels.framing.accepting import AcceptingServer
from channels.grpc import channel as grpc
from channels.grpc import tls
from channels.shm import channel as shm
from cluster.topology import HostInfo
from protos import expert_pb2_grpc


class ExpertHostServer:
    """Serves a host on free ports until `close`.

    Args:
        host: The host.
        bind: Network interface of the servers.
        node: Name of the machine.

    Attributes:
        info: Addresses of the host.
    """

    def __init__(self, host: ExpertHost, *, bind: str = "127.0.0.1", node: str = "") -> None:
        self._host = host
        self._accepting: tuple[AcceptingServer[Any], ...] = ()
        servicer = ExpertServicer(host, self.disconnect_routers)
        self._grpc = grpc.serve(
            host.handle,
            bind=f"{bind}:0",
            services=(
                lambda server: expert_pb2_grpc.add_ExpertServicer_to_server(servicer, server),
                lambda server: add_state_streams(host, server),
            ),
        )
        more: dict[str, AcceptingServer[Any]] = {"shm": shm.serve(host.handle, host.answer)}
        on_gpu, encrypts = host.device.type == "cuda", tls.directory() is not None
        if not encrypts:  # torch.distributed sends rows unencrypted
            more["collective"] = collective.serve(host.handle, bind=f"{bind}:0")
        if on_gpu:
            more["cuda"] = cuda.serve(host.handle, host.device)
        if on_gpu and not encrypts:
            more["nccl"] = nccl.serve(host.handle, host.device, bind=f"{bind}:0")
        self._accepting = tuple(more.values())
        addresses = {kind: server.address for kind, server in more.items()}
        addresses["grpc"] = self._grpc.address
        self.info = HostInfo(
            id=host.id,
            node=node,
            pid=os.getpid(),
            addresses=addresses,
        )

    def disconnect_routers(self) -> None:
        """End all open connections of routers, which may reconnect."""
        for server in self._accepting:
            server.disconnect_all()
        self._grpc.disconnect_all()

    def close(self) -> None:
        """Close all servers and connections."""
        for server in self._accepting:
            server.close()
        self._grpc.close()
        self._host.close()


__all__ = ["ExpertHostServer"]
