"""gRPC services over the plain classes."""

from __future__ import annotations

import json

import grpc

from actors.control_server import refusing
from actors.coordinator import Coordinator
from actors.expert_host import ExpertHost
from actors.wire import (
    decision_to,
    host_from,
    metrics_to,
    report_from,
    stats_to,
    table_to,
    tensor_to,
)
from protos import coordinator_pb2, coordinator_pb2_grpc, expert_pb2, expert_pb2_grpc


class ExpertServicer(expert_pb2_grpc.ExpertServicer):
    """An expert host's control calls; its data stream is a channel's."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host

    def Prepare(
        self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> expert_pb2.PrepareReply:
        with refusing(context):
            return expert_pb2.PrepareReply(step=request.step, squared_norm=self._host.prepare(request.step))

    def Commit(
        self, request: expert_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> expert_pb2.CommitReply:
        with refusing(context):
            self._host.commit(request.step, request.lr, request.scale)
            return expert_pb2.CommitReply(step=request.step)

    def Save(self, request: expert_pb2.SaveRequest, context: grpc.ServicerContext) -> expert_pb2.SaveReply:
        with refusing(context):
            return expert_pb2.SaveReply(files=self._host.save(request.directory))

    def Status(
        self, request: expert_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> expert_pb2.StatusReply:
        with refusing(context):
            return stats_to(self._host.stats())


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    """The coordinator's calls."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def RegisterHost(
        self, request: coordinator_pb2.RegisterHostRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RegisterHostReply:
        with refusing(context):
            self._coordinator.register_host(host_from(request.host))
            return coordinator_pb2.RegisterHostReply()

    def GetRoutingTable(
        self, request: coordinator_pb2.GetRoutingTableRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RoutingTable:
        with refusing(context):
            return table_to(self._coordinator.table())

    def ReportStep(
        self, request: coordinator_pb2.StepReport, context: grpc.ServicerContext
    ) -> coordinator_pb2.StepDecision:
        with refusing(context):
            return decision_to(self._coordinator.report(report_from(request)))

    def GetMetrics(
        self, request: coordinator_pb2.GetMetricsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetMetricsReply:
        with refusing(context):
            steps = self._coordinator.metrics(request.since)
            return coordinator_pb2.GetMetricsReply(steps=[metrics_to(step) for step in steps])

    def RequestStop(
        self, request: coordinator_pb2.RequestStopRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RequestStopReply:
        with refusing(context):
            return coordinator_pb2.RequestStopReply(step=self._coordinator.request_stop())

    def Fail(
        self, request: coordinator_pb2.FailRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.FailReply:
        with refusing(context):
            self._coordinator.fail(request.text)
            return coordinator_pb2.FailReply()

    def SaveHosts(
        self, request: coordinator_pb2.SaveHostsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.SaveHostsReply:
        with refusing(context):
            files = self._coordinator.save(request.directory, request.step)
            return coordinator_pb2.SaveHostsReply(files=files)

    def GetState(
        self, request: coordinator_pb2.GetStateRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetStateReply:
        with refusing(context):
            return coordinator_pb2.GetStateReply(
                state=json.dumps(self._coordinator.state()), bias=tensor_to(self._coordinator.bias())
            )

    def GetStatus(
        self, request: coordinator_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetStatusReply:
        with refusing(context):
            return coordinator_pb2.GetStatusReply(
                step=self._coordinator.step,
                epoch=self._coordinator.epoch,
                failure=self._coordinator.failure or "",
            )


__all__ = ["CoordinatorServicer", "ExpertServicer"]
