"""The channel between machines: one bidirectional gRPC stream of frames.

gRPC transports finished bytes (identity serializers), which `channels.framing.frame_codec` encodes and
decodes. A stream uses one thread of the server for as long as it lasts.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from channels.base import Channel, Handler, Request
from channels.framing import frame_codec
from channels.framing.header import require_fit
from channels.framing.ordered_channel import OrderedChannel, Reply, call
from channels.grpc import tls
from channels.grpc.failures import last_cause
from channels.grpc.guard import Guard
from channels.grpc.options import MAX_STREAMS, OPTIONS
from channels.grpc.watchdog import Watchdog
from errors import ChannelError, ChannelTimeout, ProtocolError

_log = logging.getLogger(__name__)

SERVICE: Final = "raymoe.v1.Expert"
METHOD: Final = "Exchange"
MAX_CALLS: Final = 64
"""Threads for control calls, which a host answers whatever its number of streams."""

_ASKING: Final = 1.0  # seconds


class GrpcChannel(OrderedChannel):
    """The router's end: requests go through a queue, replies are read by the caller's thread."""

    def __init__(self, name: str, channel: grpc.Channel) -> None:
        super().__init__(name)
        self._channel = channel
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._late = False
        self._watchdog = Watchdog(self._expire)
        exchange = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)
        self._replies: Any = exchange(iter(self._requests.get, None))

    def _send(self, request: Request) -> None:
        self._requests.put(_fitting(frame_codec.encode_request(request)))

    def _receive(self, deadline: float | None) -> Reply:
        if deadline is not None:
            self._watchdog.arm(deadline)
        try:
            frame: bytes = next(self._replies)
        except StopIteration:
            raise ChannelError(f"{self.name} ended the stream; connect again") from None
        except grpc.RpcError as error:
            raise self._failure(error) from error
        finally:
            self._watchdog.disarm()
        return frame_codec.decode_reply(frame)

    def _failure(self, error: Any) -> ChannelError | ProtocolError:
        if self._late:
            return ChannelTimeout(f"{self.name} does not answer")
        text = f"{self.name}: {error.code().name.lower()}: {error.details()}"
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return ProtocolError(text)
        return ChannelError(text)

    def _expire(self) -> None:
        self._late = True
        self._replies.cancel()

    def _disconnect(self) -> None:
        self._requests.put(None)  # lets gRPC's sending thread end
        self._replies.cancel()
        self._channel.close()
        self._watchdog.close()

    def _wake(self) -> None:
        self._replies.cancel()


class GrpcServer:
    """The host's end: a gRPC server with the stream of frames and the control calls of `services`."""

    def __init__(
        self,
        handler: Handler,
        *,
        bind: str,
        advertise: str | None,
        services: tuple[Callable[[Any], None], ...],
    ) -> None:
        self._handler = handler
        self._closing = threading.Lock()
        self._closed = False
        self._streams: set[Any] = set()
        self._threads = ThreadPoolExecutor(MAX_STREAMS + MAX_CALLS, thread_name_prefix="grpc-serve")
        self._server = grpc.server(
            self._threads,
            interceptors=[Guard()],
            options=OPTIONS,
            maximum_concurrent_rpcs=MAX_STREAMS + MAX_CALLS,
        )
        for register in services:
            register(self._server)
        # After the services: a servicer made from expert.proto has an Exchange of its own, which decodes
        # frames with protobuf's code; the last method that is registered is the one that is called.
        registered: Any = self._server  # grpc's stubs lack this method of its interface
        registered.add_registered_method_handlers(
            SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(self._exchange)}
        )
        try:
            port = tls.listen(self._server, bind)
        except RuntimeError as error:
            raise ChannelError(f"grpc cannot listen at {bind}: {error}; choose another port or 0") from error
        host = advertise or bind.rpartition(":")[0]
        self._address = f"grpc:{bind}" if bind.startswith("unix") else f"grpc:{host}:{port}"
        self._server.start()

    @property
    def address(self) -> str:
        """`grpc:<host>:<port>`, or `grpc:unix…` when bound to a Unix socket."""
        return self._address

    def close(self) -> None:
        """Stop accepting, close every connection, and join every thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._server.stop(grace=None).wait()
                self._threads.shutdown(wait=True)

    def disconnect_all(self) -> None:
        """Close every stream of frames that is open now; callers may connect again."""
        for context in list(self._streams):
            context.cancel()

    def _exchange(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if len(self._streams) >= MAX_STREAMS:
            text = (
                f"{MAX_STREAMS} streams are open, and no more are taken; is there a client that closes none?"
            )
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._streams.add(context)
        try:
            for frame in frames:
                try:
                    request = frame_codec.decode_request(frame)
                except ProtocolError as error:
                    _log.warning("%s: closed the connection to %s: %s", self._address, context.peer(), error)
                    context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
                    context.set_details(str(error))
                    return
                outcome = call(self._handler, request)
                del request, frame  # frees their memory before the next request comes
                yield _encode(outcome)
        except grpc.RpcError:
            return  # the caller closed the stream
        finally:
            self._streams.discard(context)


def _fitting(frame: bytes) -> bytes:
    require_fit(len(frame))
    return frame


def _encode(outcome: Reply | Exception) -> bytes:
    if isinstance(outcome, Exception):
        return frame_codec.encode_error(outcome)
    try:
        return _fitting(frame_codec.encode_reply(outcome))
    except ProtocolError as error:  # the wire cannot carry the handler's reply
        return frame_codec.encode_error(error)


def serve(
    handler: Handler,
    *,
    bind: str = "127.0.0.1:0",
    advertise: str | None = None,
    services: tuple[Callable[[Any], None], ...] = (),
) -> GrpcServer:
    """Serve `handler` to processes of any machine, in one thread per stream.

    Args:
        bind: `host:port` (port 0 takes a free one) or a `unix:` target.
        advertise: The host's name in `address`, if `bind` is a wildcard such as `0.0.0.0:0`.
        services: Functions that add control calls to the gRPC server, for example
            `lambda server: add_ExpertServicer_to_server(servicer, server)`.

    Raises:
        ChannelError: `bind` is taken, or is not an address of this machine.
    """
    return GrpcServer(handler, bind=bind, advertise=advertise, services=services)


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """Open a channel to a server of any machine.

    Raises:
        ChannelError: No server listens there.
        ChannelTimeout: There is no answer in time.
    """
    channel = tls.dial(address.removeprefix("grpc:"), OPTIONS)
    decided, found = threading.Event(), [grpc.ChannelConnectivity.IDLE]

    def moved(state: grpc.ChannelConnectivity) -> None:
        found[0] = state
        if state not in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
            decided.set()

    try:
        channel.subscribe(moved, try_to_connect=True)
        if not decided.wait(timeout):
            raise ChannelTimeout(f"{address} does not answer within {timeout} s; is its process alive?")
        channel.unsubscribe(moved)
        if found[0] is not grpc.ChannelConnectivity.READY:
            why = _why(channel)
            if not why:
                raise ChannelError(f"{address} did not listen at first, and does now: connect again")
            raise ChannelError(
                f"no process listens at {address} ({last_cause(why)}); has its process ended?"
                f"{tls.mistrust(why)}"
            )
    except BaseException:
        channel.close()
        raise
    return GrpcChannel(address, channel)


def _why(channel: grpc.Channel) -> str:
    """Why a channel could not connect, which gRPC reports on calls only; empty if it can now."""
    try:
        channel.unary_unary(f"/{SERVICE}/Ping", None, None)(b"", timeout=_ASKING)
    except grpc.RpcError as error:
        call: Any = error
        if call.code() is not grpc.StatusCode.UNIMPLEMENTED:  # that would be an answer
            return str(call.details())
    return ""


__all__ = [
    "MAX_CALLS",
    "MAX_STREAMS",
    "METHOD",
    "OPTIONS",
    "SERVICE",
    "GrpcChannel",
    "GrpcServer",
    "connect",
    "serve",
]
