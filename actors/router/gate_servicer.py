"""The gRPC service of a `GateRouter`."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from actors.messages.control_codec import (
    tensor_from,
    tensor_to,
)
from actors.router.gate_router import GateRouter
from errors import RaymoeError
from protos import (
    expert_pb2,
    router_pb2,
    router_pb2_grpc,
)


class RouterServicer(router_pb2_grpc.RouterServicer):
    """Applies MoE layers for callers outside; an error ends its own request only, not the stream."""

    def __init__(self, router: GateRouter) -> None:
        self._router = router

    def Route(
        self, request_iterator: Iterator[router_pb2.RouteRequest], context: grpc.ServicerContext
    ) -> Iterator[router_pb2.RouteReply]:
        for request in request_iterator:
            reply = router_pb2.RouteReply(id=request.id, epoch=self._router.epoch)
            try:
                out, chosen = self._router.route(request.layer, tensor_from(request.hidden))
                reply.output.CopyFrom(tensor_to(out))
                reply.experts.CopyFrom(tensor_to(chosen))
            except Exception as error:
                reply.status.code = (
                    expert_pb2.CODE_REFUSED if isinstance(error, RaymoeError) else expert_pb2.CODE_FAILED
                )
                reply.status.type, reply.status.message = type(error).__name__, str(error)
            yield reply


__all__ = ["RouterServicer"]
