"""gRPC service of an expert host: control calls, and streams of its state as frames without decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from actors.host.expert_host import ExpertHost
from actors.messages.control_codec import host_from, stats_to, tensor_to
from actors.messages.transfer_codec import assembly_from, pull_from, stored_to
from actors.rpc.control_server import not_served, refusing
from channels.grpc.channel import SERVICE
from protos import expert_pb2, expert_pb2_grpc


class ExpertServicer(expert_pb2_grpc.ExpertServicer):
    """Control calls of an expert host.

    Args:
        host: The host.
        disconnect_routers: Ends the connections of all routers; None refuses the call.
    """

    def __init__(self, host: ExpertHost, disconnect_routers: Callable[[], None] | None = None) -> None:
        self._host, self._disconnect_routers = host, disconnect_routers

    def Prepare(
        self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> expert_pb2.PrepareReply:
        with refusing(context):
            squared = self._host.prepare(request.step, _epoch(request))
            return expert_pb2.PrepareReply(squared_norm=squared)

    def Seal(self, request: expert_pb2.PrepareRequest, context: grpc.ServicerContext) -> expert_pb2.SealReply:
        with refusing(context):
            self._host.seal(request.step, _epoch(request))
            return expert_pb2.SealReply()

    def Commit(
        self, request: expert_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> expert_pb2.CommitReply:
        with refusing(context):
            self._host.commit(request.step, request.learning_rate, request.scale, _epoch(request))
            return expert_pb2.CommitReply()

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
            if self._disconnect_routers is None:
                not_served(context)
            self._disconnect_routers()
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
        not_served(context)  # channels.grpc.channel serves this method, on the same server

    def Fetch(
        self, request: expert_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.Frame]:
        not_served(context)  # `add_state_streams` serves this method and the next two

    def Put(
        self, request_iterator: Iterator[expert_pb2.Frame], context: grpc.ServicerContext
    ) -> expert_pb2.PutReply:
        not_served(context)

    def Get(
        self, request: expert_pb2.GetRequest, context: grpc.ServicerContext
    ) -> Iterator[expert_pb2.Frame]:
        not_served(context)


def add_state_streams(host: ExpertHost, server: Any) -> None:
    """Serve Fetch, Put and Get of expert.proto; to be called after the generated servicer has been added."""

    def fetch(request: expert_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with refusing(context):
            yield from host.fetch(pull_from(request))

    def put(frames: Iterator[bytes], context: grpc.ServicerContext) -> expert_pb2.PutReply:
        with refusing(context):
            host.store(frames)
            return expert_pb2.PutReply()

    def get(request: expert_pb2.GetRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with refusing(context):
            yield from host.snapshots.read(request.name, request.step)

    server.add_registered_method_handlers(
        SERVICE,
        {
            "Fetch": grpc.unary_stream_rpc_method_handler(fetch, expert_pb2.FetchRequest.FromString),
            "Put": grpc.stream_unary_rpc_method_handler(put, None, expert_pb2.PutReply.SerializeToString),
            "Get": grpc.unary_stream_rpc_method_handler(get, expert_pb2.GetRequest.FromString),
        },
    )


def _epoch(
    request: (
        expert_pb2.PrepareRequest
        | expert_pb2.CommitRequest
        | expert_pb2.SnapshotRequest
        | expert_pb2.SaveRequest
    ),
) -> int | None:
    return request.epoch if request.HasField("epoch") else None


__all__ = ["ExpertServicer", "add_state_streams"]
