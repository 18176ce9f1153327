"""A coordinator's client, over gRPC, with the methods of the plain classes.

Errors come back as what they were, with the peer named; a coordinator that is gone is a `ChannelError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from actors.messages.control_codec import (
    decision_from,
    host_from,
    host_to,
    metrics_from,
    report_to,
    table_from,
    tensor_from,
)
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport
from actors.rpc.control_server import control_channel, raising
from cluster.membership import Orders
from cluster.topology import HostInfo, RoutingTable
from protos import admin_pb2, admin_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc

_SLACK = 10.0  # seconds that a call which waits there may take on top


class CoordinatorClient:
    """Calls a `Coordinator`.

    Args:
        address: of the coordinator actor.
        timeout: seconds for one call, except for those that wait for others.
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

    def place_experts(self) -> None:
        """See `Coordinator.found`."""
        with raising(self._peer):
            self._stub.Found(coordinator_pb2.FoundRequest())

    def table(self, weights: str | None = None, timeout: float = 0.0) -> RoutingTable:
        """See `Coordinator.table`."""
        table = self._table(-1, weights, timeout)
        assert table is not None  # a coordinator without one refuses
        return table

    def table_after(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        """See `Coordinator.table_after`."""
        return self._table(serial, weights, timeout)

    def suspect(self, host: str, why: str) -> None:
        """See `Coordinator.suspect`."""
        with raising(self._peer):
            self._stub.Suspect(coordinator_pb2.SuspectRequest(host=host, why=why), timeout=self._timeout)

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str]
    ) -> tuple[Orders, int, CoordinatorState]:
        """See `Coordinator.orders`; and the coordinator's state."""
        request = coordinator_pb2.OrdersRequest(starting=starting, failed=dict(failed), stopped=stopped)
        with raising(self._peer):
            reply = self._stub.Orders(request, timeout=self._timeout)
        orders = Orders(start=reply.start, stop=tuple(reply.stop))
        return orders, int(reply.wanted), CoordinatorState.from_json(reply.state)

    def join(self, rank: int, workers: int, attempt: int, why: str) -> Resume:
        """See `TrainingSteps.join`."""
        request = coordinator_pb2.JoinRequest(rank=rank, workers=workers, attempt=attempt, why=why)
        with raising(self._peer):
            reply = self._stub.Join(request)
        return Resume(
            attempt=reply.attempt,
            step=reply.step,
            trunk=tuple(host_from(host) for host in reply.trunk),
            directory=reply.directory if reply.HasField("directory") else None,
        )

    def report(self, report: StepReport) -> StepDecision:
        """See `TrainingSteps.report`."""
        with raising(self._peer):
            return decision_from(self._stub.ReportStep(report_to(report)))

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """See `TrainingSteps.metrics`."""
        request = coordinator_pb2.GetMetricsRequest(since=since_step)
        with raising(self._peer):
            reply = self._stub.GetMetrics(request, timeout=self._timeout)
        return [metrics_from(step) for step in reply.steps]

    def request_stop(self) -> int:
        """See `TrainingSteps.request_stop`."""
        with raising(self._peer):
            reply = self._stub.RequestStop(coordinator_pb2.RequestStopRequest(), timeout=self._timeout)
            return int(reply.step)

    def fail(self, text: str) -> None:
        """See `TrainingSteps.fail`."""
        with raising(self._peer):
            self._stub.Fail(coordinator_pb2.FailRequest(text=text), timeout=self._timeout)

    def save(self, directory: str, step: int) -> list[str]:
        """See `TrainingSteps.save`."""
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

    def retire(self, keep: str = "") -> None:
        """See `Coordinator.retire`."""
        request = coordinator_pb2.RetireWeightsRequest(keep=keep)
        with raising(self._peer):
            self._stub.RetireWeights(request, timeout=self._timeout)

    def bias(self) -> Tensor:
        """See `TrainingSteps.bias`."""
        with raising(self._peer):
            reply = self._stub.GetState(coordinator_pb2.GetStateRequest(), timeout=self._timeout)
        return tensor_from(reply.bias)

    @property
    def failure(self) -> str | None:
        """See `TrainingSteps.failure`."""
        with raising(self._peer):
            reply = self._stub.GetStatus(coordinator_pb2.GetStatusRequest(), timeout=self._timeout)
        return reply.failure or None

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _table(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        request = coordinator_pb2.GetRoutingTableRequest(
            known_serial=serial, weights=weights or "", seconds=timeout
        )
        with raising(self._peer):
            reply = self._stub.GetRoutingTable(request, timeout=timeout + _SLACK)
        return table_from(reply.table) if reply.HasField("table") else None


class AdminClient:
    """Operates a running job: the Python interface of `raymoe status`, `scale` and `drain`.

    Args:
        address: of its coordinator, which `raymoe serve --json` and `raymoe train` tell; `grpc:HOST:PORT`.
        timeout: seconds for a call that waits for nothing.
    """

    def __init__(self, address: str, *, timeout: float = 30.0) -> None:
        self._peer = f"the coordinator ({address})"
        self._timeout = timeout
        self._channel = control_channel(address)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def status(self) -> dict[str, Any]:
        """See `Coordinator.status`."""
        with raising(self._peer):
            reply = self._stub.Status(admin_pb2.StatusOfJobRequest(), timeout=self._timeout)
        status: dict[str, Any] = json.loads(reply.status)
        return status

    def scale(self, hosts: int, *, timeout: float = 300.0) -> dict[str, Any]:
        """Want so many expert hosts; returns when they hold their experts, or `timeout` seconds are over.

        Returns:
            done, hosts, seconds.

        Raises:
            RaymoeError: it cannot be, or had to be given up.
        """
        with raising(self._peer):
            request = admin_pb2.ScaleRequest(hosts=hosts, seconds=timeout)
            return _scaled(self._stub.Scale(request, timeout=timeout + _SLACK))

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        """Let a host give its experts away and go; see `scale`."""
        with raising(self._peer):
            request = admin_pb2.DrainRequest(host=host, replace=replace, seconds=timeout)
            return _scaled(self._stub.Drain(request, timeout=timeout + _SLACK))

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def _scaled(reply: admin_pb2.ScaleReply) -> dict[str, Any]:
    return {"done": reply.done, "hosts": reply.hosts, "seconds": round(reply.seconds, 3)}


__all__ = ["AdminClient", "CoordinatorClient"]
