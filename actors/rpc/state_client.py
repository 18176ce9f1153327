"""Client of the streams of an expert host's state over gRPC, whose frames are not decoded by gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from actors.messages.tensor_stream import TensorFiller, read_heading
from actors.messages.transfer_codec import blob_frames, blob_from, empty_tensors, pull_to
from actors.messages.transfer_orders import Blob, Pull
from actors.rpc.control_server import raising
from channels.grpc.channel import SERVICE
from protos import expert_pb2


class StateClient:
    """Fetch, Put and Get of one host.

    Args:
        channel: gRPC channel to the host; closed by its owner.
        peer: Name of the host in error messages.
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
        """The state of experts, as frames."""
        return self._frames(self._fetch(pull_to(pull)))

    def store(self, frames: Iterator[bytes]) -> None:
        """Store a copy that is given as frames; an error raised by `frames` is raised here."""
        failed: list[Exception] = []

        def until_failure() -> Iterator[bytes]:  # gRPC would log the error and report another one
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
        """Store named tensors."""
        self.store(blob_frames(blob))

    def get(self, name: str, step: int) -> Blob:
        """Named tensors of a step."""
        stream = self._frames(self._get(expert_pb2.GetRequest(name=name, step=step)))
        said = read_heading(stream)
        tensors = empty_tensors(said)
        TensorFiller(list(tensors.values())).read(stream)
        return blob_from(said, tensors)

    def _frames(self, stream: Any) -> Iterator[bytes]:
        try:
            with raising(self._peer):
                yield from stream
        finally:
            stream.cancel()


__all__ = ["StateClient"]
