"""Clients with the methods of the plain classes, over gRPC.

Errors come back as what they were, with the peer named; a peer that is gone is a `ChannelError`.
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
    """Commands an `ExpertHost`; implements `actors.messages.steps.HostControl`.

    Args:
        host: the host; its address of kind `grpc` is used.
        timeout: seconds for one call, those apart that move or save state; None waits for ever.
    """

    def __init__(self, host: HostInfo, *, timeout: float | None = None) -> None:
        address = host.addresses["grpc"]
        self._peer = f"expert host {host.id} ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = expert_pb2_grpc.ExpertStub(self._channel)
        self._state = StateClient(self._channel, self._peer)

    def prepare(self, step: int, epoch: int | None = None) -> float:
        """See `ExpertHost.prepare`."""
        request = expert_pb2.PrepareRequest(step=step, epoch=epoch)
        with raising(self._peer):
            return float(self._stub.Prepare(request).squared_norm)

    def seal(self, step: int, epoch: int | None = None) -> None:
        """See `ExpertHost.seal`."""
        with raising(self._peer):
            self._stub.Seal(expert_pb2.PrepareRequest(step=step, epoch=epoch), timeout=self._timeout)

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        """See `ExpertHost.commit`."""
        request = expert_pb2.CommitRequest(step=step, learning_rate=learning_rate, scale=scale, epoch=epoch)
        with raising(self._peer):
            self._stub.Commit(request, timeout=self._timeout)

    def save(self, directory: str, epoch: int | None = None) -> Sequence[str]:
        """See `ExpertHost.save`."""
        with raising(self._peer):
            return list(self._stub.Save(expert_pb2.SaveRequest(directory=directory, epoch=epoch)).files)

    def assemble(self, order: Assembly) -> None:
        """See `ExpertHost.assemble`."""
        with raising(self._peer):
            self._stub.Assemble(assembly_to(order))

    def retain(self, *epochs: int) -> None:
        """See `ExpertHost.retain`."""
        with raising(self._peer):
            self._stub.Retain(expert_pb2.RetainRequest(epochs=epochs), timeout=self._timeout)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """See `ExpertHost.fetch`."""
        return self._state.fetch(pull)

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """See `ExpertHost.snapshot`; returns when the state has been copied aside."""
        request = expert_pb2.SnapshotRequest(step=step, buddies=map(host_to, buddies), epoch=epoch)
        with raising(self._peer):
            self._stub.Snapshot(request)

    def store(self, frames: Iterator[bytes]) -> None:
        """See `ExpertHost.store`."""
        self._state.store(frames)

    def put(self, blob: Blob) -> None:
        """See `ExpertHost.put`."""
        self._state.put(blob)

    def get(self, name: str, step: int) -> Blob:
        """See `ExpertHost.get`."""
        return self._state.get(name, step)

    def inventory(self) -> Sequence[StoredCopy]:
        """See `ExpertHost.inventory`."""
        with raising(self._peer):
            reply = self._stub.Inventory(expert_pb2.InventoryRequest(), timeout=self._timeout)
        return [stored_from(one) for one in reply.stored]

    def loads(self) -> Tensor:
        """See `ExpertHost.loads`."""
        with raising(self._peer):
            return tensor_from(self._stub.Loads(expert_pb2.LoadsRequest(), timeout=self._timeout).loads)

    def hang_up(self) -> None:
        """See `ExpertHostServer.hang_up`."""
        with raising(self._peer):
            self._stub.HangUp(expert_pb2.HangUpRequest(), timeout=self._timeout)

    def ping(self, timeout: float) -> None:
        """Whether the host answers, within so many seconds.

        Raises:
            ChannelTimeout: not in time.
            ChannelError: its process is gone.
        """
        with raising(self._peer):
            self._stub.Ping(expert_pb2.PingRequest(), timeout=timeout)

    def stats(self) -> HostStats:
        """See `ExpertHost.stats`."""
        with raising(self._peer):
            return stats_from(self._stub.Status(expert_pb2.StatusRequest(), timeout=self._timeout))

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


__all__ = ["HostClient"]
