"""Clients with the methods of the plain classes, over gRPC.

Errors come back as what they were, with the peer named; a peer that is gone is a `ChannelError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from actors.control_server import control_channel, raising
from actors.moves import Assembly, Blob, Pull, Stored
from actors.state_client import StateClient
from actors.state_wire import assembly_to, stored_from
from actors.steps import HostStats, StepDecision, StepMetrics, StepReport
from actors.wire import (
    decision_from,
    host_to,
    metrics_from,
    report_to,
    stats_from,
    table_from,
    tensor_from,
)
from cluster.topology import HostInfo, RoutingTable
from protos import coordinator_pb2, coordinator_pb2_grpc, expert_pb2, expert_pb2_grpc


class HostClient:
    """Commands an `ExpertHost`; implements `actors.steps.HostControl`.

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

    def prepare(self, step: int) -> float:
        """See `ExpertHost.prepare`."""
        with raising(self._peer):
            reply = self._stub.Prepare(expert_pb2.PrepareRequest(step=step), timeout=self._timeout)
            return float(reply.squared_norm)

    def commit(self, step: int, learning_rate: float, scale: float) -> None:
        """See `ExpertHost.commit`."""
        request = expert_pb2.CommitRequest(step=step, lr=learning_rate, scale=scale)
        with raising(self._peer):
            self._stub.Commit(request, timeout=self._timeout)

    def save(self, directory: str) -> Sequence[str]:
        """See `ExpertHost.save`."""
        with raising(self._peer):
            return list(self._stub.Save(expert_pb2.SaveRequest(directory=directory)).files)

    def load(self, epoch: int, directory: str) -> None:
        """See `ExpertHost.load`."""
        with raising(self._peer):
            self._stub.Load(expert_pb2.LoadRequest(epoch=epoch, directory=directory))

    def assemble(self, order: Assembly) -> None:
        """See `ExpertHost.assemble`."""
        with raising(self._peer):
            self._stub.Assemble(assembly_to(order))

    def retain(self, epoch: int) -> None:
        """See `ExpertHost.retain`."""
        with raising(self._peer):
            self._stub.Retain(expert_pb2.RetainRequest(epoch=epoch), timeout=self._timeout)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """See `ExpertHost.fetch`."""
        return self._state.fetch(pull)

    def snapshot(self, step: int, buddies: Sequence[HostInfo]) -> None:
        """See `ExpertHost.snapshot`; returns when the state has been copied aside."""
        request = expert_pb2.SnapshotRequest(step=step, buddies=[host_to(buddy) for buddy in buddies])
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

    def inventory(self) -> Sequence[Stored]:
        """See `ExpertHost.inventory`."""
        with raising(self._peer):
            reply = self._stub.Inventory(expert_pb2.InventoryRequest(), timeout=self._timeout)
        return [stored_from(one) for one in reply.stored]

    def loads(self) -> Tensor:
        """See `ExpertHost.loads`."""
        with raising(self._peer):
            return tensor_from(self._stub.Loads(expert_pb2.LoadsRequest(), timeout=self._timeout).loads)

    def stats(self) -> HostStats:
        """See `ExpertHost.stats`."""
        with raising(self._peer):
            return stats_from(self._stub.Status(expert_pb2.StatusRequest(), timeout=self._timeout))

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


class CoordinatorClient:
    """Calls a `Coordinator`.

    Args:
        address: of the coordinator actor.
        timeout: seconds for one call, except for `report`, `save` and `load`, which wait for others.
    """

    def __init__(self, address: str, *, timeout: float | None = 60.0) -> None:
        self._peer = f"the coordinator ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)

    def register_host(self, info: HostInfo) -> None:
        """See `Coordinator.register_host`."""
        request = coordinator_pb2.RegisterHostRequest(host=host_to(info))
        with raising(self._peer):
            self._stub.RegisterHost(request, timeout=self._timeout)

    def table(self) -> RoutingTable:
        """See `Coordinator.table`."""
        request = coordinator_pb2.GetRoutingTableRequest(known_epoch=-1)
        with raising(self._peer):
            return table_from(self._stub.GetRoutingTable(request, timeout=self._timeout))

    def report(self, report: StepReport) -> StepDecision:
        """See `Coordinator.report`."""
        with raising(self._peer):
            return decision_from(self._stub.ReportStep(report_to(report)))

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """See `Coordinator.metrics`."""
        request = coordinator_pb2.GetMetricsRequest(since=since_step)
        with raising(self._peer):
            reply = self._stub.GetMetrics(request, timeout=self._timeout)
        return [metrics_from(step) for step in reply.steps]

    def request_stop(self) -> int:
        """See `Coordinator.request_stop`."""
        with raising(self._peer):
            reply = self._stub.RequestStop(coordinator_pb2.RequestStopRequest(), timeout=self._timeout)
            return int(reply.step)

    def fail(self, text: str) -> None:
        """See `Coordinator.fail`."""
        with raising(self._peer):
            self._stub.Fail(coordinator_pb2.FailRequest(text=text), timeout=self._timeout)

    def save(self, directory: str, step: int) -> list[str]:
        """See `Coordinator.save`."""
        request = coordinator_pb2.SaveHostsRequest(directory=directory, step=step)
        with raising(self._peer):
            return list(self._stub.SaveHosts(request).files)

    def load(self, directory: str, version: str) -> int:
        """See `Coordinator.load`."""
        request = coordinator_pb2.LoadWeightsRequest(directory=directory, version=version)
        with raising(self._peer):
            return int(self._stub.LoadWeights(request).epoch)

    def publish(self, epoch: int) -> None:
        """See `Coordinator.publish`."""
        request = coordinator_pb2.PublishWeightsRequest(epoch=epoch)
        with raising(self._peer):
            self._stub.PublishWeights(request, timeout=self._timeout)

    def retire(self) -> None:
        """See `Coordinator.retire`."""
        with raising(self._peer):
            self._stub.RetireWeights(coordinator_pb2.RetireWeightsRequest(), timeout=self._timeout)

    def state(self) -> dict[str, Any]:
        """See `Coordinator.state`."""
        state: dict[str, Any] = json.loads(self._get_state().state)
        return state

    def bias(self) -> Tensor:
        """See `Coordinator.bias`."""
        return tensor_from(self._get_state().bias)

    @property
    def failure(self) -> str | None:
        """See `Coordinator.failure`."""
        with raising(self._peer):
            reply = self._stub.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=self._timeout)
        return reply.failure or None

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _get_state(self) -> coordinator_pb2.GetStateReply:
        with raising(self._peer):
            return self._stub.GetState(coordinator_pb2.GetStateRequest(), timeout=self._timeout)


__all__ = ["CoordinatorClient", "HostClient"]
