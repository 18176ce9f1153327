"""An expert host with everything that others reach it by: shared memory, gRPC, control calls."""

from __future__ import annotations

import os

from actors.expert_host import ExpertHost
from actors.servicers import ExpertServicer
from actors.state_servicer import add_state_streams
from channels import grpc, shm
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
        servicer = ExpertServicer(host, self.hang_up)
        self._shm = shm.serve(host.handle, host.answer)
        self._grpc = grpc.serve(
            host.handle,
            bind=f"{bind}:0",
            services=(
                lambda server: expert_pb2_grpc.add_ExpertServicer_to_server(servicer, server),
                lambda server: add_state_streams(host, server),
            ),
        )
        self.info = HostInfo(
            id=host.id,
            node=node,
            pid=os.getpid(),
            addresses={"shm": self._shm.address, "grpc": self._grpc.address},
        )

    def hang_up(self) -> None:
        """End every connection of a router that is open now; they may come again."""
        self._shm.hang_up()
        self._grpc.hang_up()

    def close(self) -> None:
        """Hang up on every caller."""
        self._shm.close()
        self._grpc.close()
        self._host.close()


__all__ = ["ExpertHostServer"]
