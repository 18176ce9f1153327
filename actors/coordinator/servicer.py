"""gRPC services of a coordinator: for workers, routers and fleets, and for the operators of a job."""

from __future__ import annotations

import json
import uuid

import grpc

from actors.coordinator.coordinator import Coordinator
from actors.coordinator.host_roster import steady
from actors.messages.control_codec import host_from, host_to, table_to, tensor_to
from actors.messages.steps import StepReport
from actors.rpc.control_server import refusing
from cluster.events import Event
from cluster.membership import Scaling
from protos import admin_pb2, admin_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServicer):
    """Calls of workers, routers and fleets to a coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def RegisterHost(
        self, request: coordinator_pb2.RegisterHostRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RegisterHostReply:
        with refusing(context):
            self._coordinator.register_host(host_from(request.host))
            return coordinator_pb2.RegisterHostReply()

    def PlaceExperts(
        self, request: coordinator_pb2.PlaceExpertsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.PlaceExpertsReply:
        with refusing(context):
            self._coordinator.place_experts()
            return coordinator_pb2.PlaceExpertsReply()

    def GetRoutingTable(
        self, request: coordinator_pb2.GetRoutingTableRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetRoutingTableReply:
        with refusing(context):
            weights = request.weights or None
            if request.known_serial < 0:
                table = self._coordinator.table(weights, request.timeout)
            else:
                found = self._coordinator.table_after(request.known_serial, weights, request.timeout)
                if found is None:
                    return coordinator_pb2.GetRoutingTableReply()
                table = found
            return coordinator_pb2.GetRoutingTableReply(table=table_to(table))

    def Suspect(
        self, request: coordinator_pb2.SuspectRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.SuspectReply:
        with refusing(context):
            self._coordinator.suspect(request.host, request.why)
            return coordinator_pb2.SuspectReply()

    def RecordEvent(
        self, request: coordinator_pb2.RecordEventRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RecordEventReply:
        with refusing(context):
            self._coordinator.roster.record(Event(at=request.at, kind=request.kind, text=request.text))
            return coordinator_pb2.RecordEventReply()

    def Orders(
        self, request: coordinator_pb2.OrdersRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.OrdersReply:
        with refusing(context):
            orders, wanted = self._coordinator.orders(
                starting=request.starting,
                failed=dict(request.failed),
                stopped=list(request.stopped),
                lacking=request.lacking,
            )
            return coordinator_pb2.OrdersReply(
                start=orders.start,
                stop=orders.stop,
                cancel=orders.cancel,
                wanted=wanted,
                state=self._coordinator.state().to_json(),
            )

    def Join(
        self, request: coordinator_pb2.JoinRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.JoinReply:
        with refusing(context):
            resume = self._coordinator.steps.join(request.rank, request.workers, request.attempt, request.why)
            return coordinator_pb2.JoinReply(
                attempt=resume.attempt,
                step=resume.step,
                trunk=[host_to(host) for host in resume.trunk],
                directory=resume.directory,
            )

    def ReportStep(
        self, request: coordinator_pb2.StepReport, context: grpc.ServicerContext
    ) -> coordinator_pb2.StepDecision:
        with refusing(context):
            report = StepReport.from_message(request)
            return self._coordinator.steps.report(report).to_message()

    def GetMetrics(
        self, request: coordinator_pb2.GetMetricsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetMetricsReply:
        with refusing(context):
            steps = self._coordinator.steps.metrics(request.since_step)
            return coordinator_pb2.GetMetricsReply(steps=[step.to_message() for step in steps])

    def RequestStop(
        self, request: coordinator_pb2.RequestStopRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RequestStopReply:
        with refusing(context):
            return coordinator_pb2.RequestStopReply(step=self._coordinator.steps.request_stop())

    def Fail(
        self, request: coordinator_pb2.FailRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.FailReply:
        with refusing(context):
            self._coordinator.steps.fail(request.text)
            return coordinator_pb2.FailReply()

    def SaveHosts(
        self, request: coordinator_pb2.SaveHostsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.SaveHostsReply:
        with refusing(context):
            files = self._coordinator.steps.save(request.directory, request.step)
            return coordinator_pb2.SaveHostsReply(files=files)

    def LoadWeights(
        self, request: coordinator_pb2.LoadWeightsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.LoadWeightsReply:
        with refusing(context):
            epoch = self._coordinator.placements.load(request.directory, request.name)
            return coordinator_pb2.LoadWeightsReply(epoch=epoch)

    def PublishWeights(
        self, request: coordinator_pb2.PublishWeightsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.PublishWeightsReply:
        with refusing(context):
            self._coordinator.placements.publish(request.epoch)
            return coordinator_pb2.PublishWeightsReply()

    def RetireWeights(
        self, request: coordinator_pb2.RetireWeightsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RetireWeightsReply:
        with refusing(context):
            self._coordinator.placements.retire(request.keep)
            return coordinator_pb2.RetireWeightsReply()

    def GetBias(
        self, request: coordinator_pb2.GetBiasRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetBiasReply:
        with refusing(context):
            return coordinator_pb2.GetBiasReply(bias=tensor_to(self._coordinator.steps.bias()))

    def GetFailure(
        self, request: coordinator_pb2.GetFailureRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.GetFailureReply:
        with refusing(context):
            return coordinator_pb2.GetFailureReply(failure=self._coordinator.steps.failure)


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Calls of a job's operators to its coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._recorder = uuid.uuid4().hex  # of the events of this process

    def Status(
        self, request: admin_pb2.StatusOfJobRequest, context: grpc.ServicerContext
    ) -> admin_pb2.StatusOfJobReply:
        with refusing(context):
            return admin_pb2.StatusOfJobReply(status=json.dumps(self._coordinator.status()))

    def Describe(
        self, request: admin_pb2.DescribeJobRequest, context: grpc.ServicerContext
    ) -> admin_pb2.DescribeJobReply:
        with refusing(context):
            job = self._coordinator.job
            return admin_pb2.DescribeJobReply(
                id=job.id, name=job.name, cluster=job.cluster, doing=self._coordinator.doing()
            )

    def Events(
        self, request: admin_pb2.EventsRequest, context: grpc.ServicerContext
    ) -> admin_pb2.EventsReply:
        with refusing(context):
            known = request.known if request.recorder == self._recorder else 0
            recorded, events = self._coordinator.roster.events_after(known)
            return admin_pb2.EventsReply(
                recorder=self._recorder,
                known=recorded,
                events=[admin_pb2.JobEvent(at=one.at, kind=one.kind, text=one.text) for one in events],
            )

    def Scale(self, request: admin_pb2.ScaleRequest, context: grpc.ServicerContext) -> admin_pb2.ScaleReply:
        with refusing(context):
            done = self._coordinator.scale(request.hosts, request.timeout, why=request.why)
            return self._reply(done)

    def Drain(self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext) -> admin_pb2.ScaleReply:
        with refusing(context):
            done = self._coordinator.drain(request.host, request.timeout, replace=request.replace)
            return self._reply(done)

    def _reply(self, scaling: Scaling) -> admin_pb2.ScaleReply:
        done = scaling.ended is not None
        ended = steady() if scaling.ended is None else scaling.ended
        return admin_pb2.ScaleReply(
            done=done,
            hosts=scaling.target,
            seconds=ended - scaling.began,
            lacking="" if done else self._coordinator.roster.lacking,
        )


__all__ = ["AdminServicer", "CoordinatorServicer"]
