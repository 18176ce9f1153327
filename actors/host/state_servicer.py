"""The streams of an expert host's state over gRPC, the host's end: frames as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from actors.host.host_state import HostState
from actors.messages.transfer_codec import pull_from
from actors.rpc.control_server import refusing
from channels.grpc.channel import SERVICE
from protos import expert_pb2


def add_state_streams(host: HostState, server: Any) -> None:
    """Serve Fetch, Put and Get of expert.proto; call it after the generated servicer has been added."""

    def fetch(request: expert_pb2.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with refusing(context):
            yield from host.fetch(pull_from(request))

    def put(frames: Iterator[bytes], context: grpc.ServicerContext) -> expert_pb2.PutReply:
        with refusing(context):
            host.store(frames)
            return expert_pb2.PutReply()

    def get(request: expert_pb2.GetRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with refusing(context):
            yield from host.read(request.name, request.step)

    server.add_registered_method_handlers(
        SERVICE,
        {
            "Fetch": grpc.unary_stream_rpc_method_handler(fetch, expert_pb2.FetchRequest.FromString),
            "Put": grpc.stream_unary_rpc_method_handler(put, None, expert_pb2.PutReply.SerializeToString),
            "Get": grpc.unary_stream_rpc_method_handler(get, expert_pb2.GetRequest.FromString),
        },
    )


__all__ = ["add_state_streams"]
