"""Client of an expert host over gRPC.

An error of the host is raised with its own class and names the host; when its process is gone, a
`ChannelError` is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from actors.messages.control_codec import host_to, stats_from, tensor_from
from actors.messages.host_control import HostStats
from actors.messages.transfer_codec import assembly_to, stored_from
from actors.messages.transfer_orders import Assembly, Blob, Pull, StoredCopy
from actors.rpc.control_server import control_channel, raising
from actors.rpc.state_client import StateClient
from cluster.topology import HostInfo
from protos import expert_pb2, expert_pb2_grpc


class HostClient:
    """Client of an `ExpertHost`; implements `HostControl` and `Peer`, which describe the methods.

    Args:
        host: The host; its address of kind `grpc` is used.
        timeout: Seconds for one call, except for calls that move or save state; None waits without a limit.
    """

    def __init__(self, host: HostInfo, *, timeout: float | None = None) -> None:
        address = host.addresses["grpc"]
        self._peer = f"expert host {host.id} ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = expert_pb2_grpc.ExpertStub(self._channel)
        self._state = StateClient(self._channel, self._peer)

    def prepare(self, step: int, epoch: int | None = None) -> float:
        request = expert_pb2.PrepareRequest(step=step, epoch=epoch)
        with raising(self._peer):
            return float(self._stub.Prepare(request).squared_norm)

    def seal(self, step: int, epoch: int | None = None) -> None:
        with raising(self._peer):
            self._stub.Seal(expert_pb2.PrepareRequest(step=step, epoch=epoch), timeout=self._timeout)

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        request = expert_pb2.CommitRequest(step=step, learning_rate=learning_rate, scale=scale, epoch=epoch)
        with raising(self._peer):
            self._stub.Commit(request, timeout=self._timeout)

    def save(self, directory: str, epoch: int | None = None) -> Sequence[str]:
        with raising(self._peer):
            return list(self._stub.Save(expert_pb2.SaveRequest(directory=directory, epoch=epoch)).files)

    def assemble(self, order: Assembly) -> None:
        with raising(self._peer):
            self._stub.Assemble(assembly_to(order))

    def retain(self, *epochs: int) -> None:
        with raising(self._peer):
            self._stub.Retain(expert_pb2.RetainRequest(epochs=epochs), timeout=self._timeout)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        return self._state.fetch(pull)

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Have the host keep a snapshot; returns when the state has been copied in the host's memory."""
        request = expert_pb2.SnapshotRequest(step=step, buddies=map(host_to, buddies), epoch=epoch)
        with raising(self._peer):
            self._stub.Snapshot(request)

    def store(self, frames: Iterator[bytes]) -> None:
        self._state.store(frames)

    def put(self, blob: Blob) -> None:
        self._state.put(blob)

    def get(self, name: str, step: int) -> Blob:
        return self._state.get(name, step)

    def inventory(self) -> Sequence[StoredCopy]:
        with raising(self._peer):
            reply = self._stub.Inventory(expert_pb2.InventoryRequest(), timeout=self._timeout)
        return [stored_from(one) for one in reply.stored]

    def loads(self) -> Tensor:
        with raising(self._peer):
            return tensor_from(self._stub.Loads(expert_pb2.LoadsRequest(), timeout=self._timeout).loads)

    def disconnect_routers(self) -> None:
        """Have the host close its routers' connections, which may be opened again."""
        with raising(self._peer):
            self._stub.HangUp(expert_pb2.HangUpRequest(), timeout=self._timeout)

    def ping(self, timeout: float) -> None:
        """Check that the host answers within `timeout` seconds.

        Raises:
            ChannelTimeout: It does not answer in time.
            ChannelError: Its process is gone.
        """
        with raising(self._peer):
            self._stub.Ping(expert_pb2.PingRequest(), timeout=timeout)

    def stats(self) -> HostStats:
        with raising(self._peer):
            return stats_from(self._stub.Status(expert_pb2.StatusRequest(), timeout=self._timeout))

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._channel.close()


__all__ = ["HostClient"]
