"""gRPC services over the plain classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from actors.host.expert_host import ExpertHost
from actors.messages.control_codec import (
    host_from,
    stats_to,
    tensor_to,
)
from actors.messages.transfer_codec import assembly_from, stored_to
from actors.rpc.control_server import not_served, refusing
from protos import (
    expert_pb2,
    expert_pb2_grpc,
)


class ExpertServicer(expert_pb2_grpc.ExpertServicer):
    """An expert host's control calls; its data stream is a channel's."""

    def __init__(self, host: ExpertHost, hang_up: Callable[[], None] | None = None) -> None:
        self._host, self._hang_up = host, hang_up

    def Prepare(
        self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> expert_pb2.PrepareReply:
        with refusing(context):
            squared = self._host.prepare(request.step, _epoch(request))
            return expert_pb2.PrepareReply(step=request.step, squared_norm=squared)

    def Seal(self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext) -> expert_pb2.SealReply:
        with refusing(context):
            self._host.seal(request.step, _epoch(request))
            return expert_pb2.SealReply()

    def Commit(
        self, request: expert_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> expert_pb2.CommitReply:
        with refusing(context):
            self._host.commit(request.step, request.lr, request.scale, _epoch(request))
            return expert_pb2.CommitReply(step=request.step)

    def Save(self, request: expert_pb2.SaveRequest, context: grpc.ServicerContext) -> expert_pb2.SaveReply:
        with refusing(context):
            return expert_pb2.SaveReply(files=self._host.save(request.directory, _epoch(request)))

    def Assemble(
        self, request: expert_pb2.AssembleRequest, context: grpc.ServicerContext
    ) -> expert_pb2.AssembleReply:
        with refusing(context):
            self._host.assemble(assembly_from(request))
            return expert_pb2.AssembleReply()

    def Retain(
        self, request: expert_pb2.RetainRequest, context: grpc.ServicerContext
    ) -> expert_pb2.RetainReply:
        with refusing(context):
            self._host.retain(*request.epochs)
            return expert_pb2.RetainReply()

    def HangUp(
        self, request: expert_pb2.HangUpRequest, context: grpc.ServicerContext
    ) -> expert_pb2.HangUpReply:
        with refusing(context):
            if self._hang_up is None:
                not_served(context)
            self._hang_up()
            return expert_pb2.HangUpReply()

    def Ping(self, request: expert_pb2.PingRequest, context: grpc.ServicerContext) -> expert_pb2.PingReply:
        return expert_pb2.PingReply()

    def Snapshot(
        self, request: expert_pb2.SnapshotRequest, context: grpc.ServicerContext
    ) -> expert_pb2.SnapshotReply:
        with refusing(context):
            self._host.snapshot(
                request.step, [host_from(buddy) for buddy in request.buddies], _epoch(request)
            )
            return expert_pb2.SnapshotReply()

    def Inventory(
        self, request: expert_pb2.InventoryRequest, context: grpc.ServicerContext
    ) -> expert_pb2.InventoryReply:
        with refusing(context):
            return expert_pb2.InventoryReply(stored=[stored_to(one) for one in self._host.inventory()])

    def Loads(self, request: expert_pb2.LoadsRequest, context: grpc.ServicerContext) -> expert_pb2.LoadsReply:
        with refusing(context):
            return expert_pb2.LoadsReply(loads=tensor_to(self._host.loads()))

    def Status(
        self, request: expert_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> expert_pb2.StatusReply:
        with refusing(context):
            return stats_to(self._host.stats())

    def Exchange(
        self, request_iterator: Iterator[expert_pb2.Frame], context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.Frame]:
        not_served(context)  # channels.grpc.channel serves it, on the same server

    def Fetch(
        self, request: expert_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.Frame]:
        not_served(context)  # actors.host.state_servicer serves it and the next two

    def Put(
        self, request_iterator: Iterator[expert_pb2.Frame], context: grpc.ServicerContext
    ) -> expert_pb2.PutReply:
        not_served(context)

    def Get(
        self, request: expert_pb2.GetRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.Frame]:
        not_served(context)


def _epoch(
    request: (
        expert_pb2.PrepareRequest
        | expert_pb2.CommitRequest
        | expert_pb2.SnapshotRequest
        | expert_pb2.SaveRequest
    ),
) -> int | None:
    return request.epoch if request.HasField("epoch") else None


__all__ = ["ExpertServicer"]
