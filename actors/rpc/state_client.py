"""The streams of an expert host's state over gRPC, the caller's end: frames as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from actors.messages.tensor_stream import Inflow, read_head
from actors.messages.transfer_codec import blob_frames, blob_from, empty_tensors, pull_to
from actors.messages.transfer_orders import Blob, Pull
from actors.rpc.control_server import raising
from channels.grpc.channel import SERVICE
from protos import expert_pb2


class StateClient:
    """Fetch, Put and Get of one host.

    Args:
        channel: to it; the owner closes it.
        peer: names it in errors.
    """

    def __init__(self, channel: grpc.Channel, peer: str) -> None:
        self._peer = peer
        self._fetch: Any = channel.unary_stream(
            f"/{SERVICE}/Fetch", expert_pb2.FetchRequest.SerializeToString, None
        )
        self._put: Any = channel.stream_unary(f"/{SERVICE}/Put", None, expert_pb2.PutReply.FromString)
        self._get: Any = channel.unary_stream(
            f"/{SERVICE}/Get", expert_pb2.GetRequest.SerializeToString, None
        )

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """See `HostState.fetch`."""
        return self._frames(self._fetch(pull_to(pull)))

    def store(self, frames: Iterator[bytes]) -> None:
        """See `HostState.store`."""
        failed: list[Exception] = []

        def until_failure() -> Iterator[bytes]:  # gRPC would log the error, and say something else
            try:
                yield from frames
            except Exception as error:
                failed.append(error)

        try:
            with raising(self._peer):
                self._put(until_failure())
        finally:
            if failed:
                raise failed[0]

    def put(self, blob: Blob) -> None:
        """See `HostState.put`."""
        self.store(blob_frames(blob))

    def get(self, name: str, step: int) -> Blob:
        """See `HostState.get`."""
        stream = self._frames(self._get(expert_pb2.GetRequest(name=name, step=step)))
        said = read_head(stream)
        tensors = empty_tensors(said)
        Inflow(list(tensors.values())).read(stream)
        return blob_from(said, tensors)

    def _frames(self, stream: Any) -> Iterator[bytes]:
        try:
            with raising(self._peer):
                yield from stream
        finally:
            stream.cancel()


__all__ = ["StateClient"]
