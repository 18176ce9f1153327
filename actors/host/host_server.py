"""An expert host with everything that others reach it by: the channels, and control calls."""

from __future__ import annotations

import os
from typing import Any

from actors.host.expert_host import ExpertHost
from actors.host.host_servicer import ExpertServicer
from actors.host.state_servicer import add_state_streams
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
        host: the host.
        bind: the interface of the gRPC server.
        node: the machine, as others name it.
    """

    def __init__(self, host: ExpertHost, *, bind: str = "127.0.0.1", node: str = "") -> None:
        self._host = host
        self._accepting: tuple[AcceptingServer[Any], ...] = ()
        servicer = ExpertServicer(host, self.hang_up)
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
        if not encrypts:  # rows between ranks are not
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

    def hang_up(self) -> None:
        """End every connection of a router that is open now; they may come again."""
        for server in self._accepting:
            server.disconnect_all()
        self._grpc.disconnect_all()

    def close(self) -> None:
        """Hang up on every caller."""
        for server in self._accepting:
            server.close()
        self._grpc.close()
        self._host.close()


__all__ = ["ExpertHostServer"]
