"""An expert host with everything that others reach it by: the channels, and control calls."""

from __future__ import annotations

import os

from actors.expert_host import ExpertHost
from actors.servicers import ExpertServicer
from actors.state_servicer import add_state_streams
from channels import collective, grpc, shm, tls
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
        # Its rows are not encrypted: where TLS is asked for, there is none.
        self._collective = (
            collective.serve(host.handle, bind=f"{bind}:0") if tls.directory() is None else None
        )
        addresses = {"shm": self._shm.address, "grpc": self._grpc.address}
        if self._collective is not None:
            addresses["collective"] = self._collective.address
        self.info = HostInfo(
            id=host.id,
            node=node,
            pid=os.getpid(),
            addresses=addresses,
        )

    def hang_up(self) -> None:
        """End every connection of a router that is open now; they may come again."""
        self._shm.hang_up()
        if self._collective is not None:
            self._collective.hang_up()
        self._grpc.hang_up()

    def close(self) -> None:
        """Hang up on every caller."""
        self._shm.close()
        if self._collective is not None:
            self._collective.close()
        self._grpc.close()
        self._host.close()


__all__ = ["ExpertHostServer"]
