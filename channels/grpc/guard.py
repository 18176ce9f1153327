"""Protection of gRPC servers: a limit of calls per second and address, and parsing that frees its memory.

Requests of control calls are parsed here and not by gRPC: each call that gRPC's own deserializer refuses
leaks about 17 KB of the server's memory (grpcio 1.85), which a peer that sends garbage would fill.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from errors import ProtocolError

_log = logging.getLogger(__name__)

CALLS_PER_SECOND: Final = 2000.0
"""Average limit of control calls from one address; a step of training makes a handful to each host."""
BURST: Final = 4000.0
_MAX_ADDRESSES: Final = 4096


class Rate:
    """A token bucket for each address.

    Args:
        per_second: Tokens that are added per second.
        burst: Tokens that an address begins with, and the most that it has.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        per_second: float = CALLS_PER_SECOND,
        burst: float = BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.per_second, self._burst, self._clock = per_second, burst, clock
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and the time at which they were counted
        self._lock = threading.Lock()

    def admits(self, address: str) -> bool:
        """Take a token of an address; whether it had one."""
        now = self._clock()
        with self._lock:
            left, then = self._left.pop(address, (self._burst, now))
            left = min(self._burst, left + (now - then) * self.per_second)
            admitted = left >= 1.0
            self._left[address] = (left - admitted, now)  # the latest address is the last
            if len(self._left) > _MAX_ADDRESSES:
                del self._left[next(iter(self._left))]
        return admitted


class Guard(grpc.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the stubs alone
    """Replaces handlers by ones without a deserializer, which check the rate and then parse the request."""

    def __init__(self, rate: Rate | None = None) -> None:
        self._rate = rate or Rate()
        self._handlers: dict[str, Any] = {}  # by method: made once

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler of a call; None if the method is not served."""
        method = handler_call_details.method
        found = self._handlers.get(method)
        if found is None:
            found = continuation(handler_call_details)
            if found is None:
                return None
            self._handlers[method] = found = self._guarded(method, found)
        return found

    def _guarded(self, method: str, handler: Any) -> Any:
        makers = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }
        make, behaviour = makers[handler.request_streaming, handler.response_streaming]
        parse = handler.request_deserializer

        def act(request: Any, context: Any) -> Any:
            if not self._rate.admits(_address(context.peer())):
                text = f"more than {self._rate.per_second:g} calls a second from one address"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            if parse is None:  # finished bytes, such as frames
                return behaviour(request, context)
            if handler.request_streaming:
                return behaviour(_parsed(method, parse, request, context), context)
            try:
                parsed = parse(request)
            except DecodeError as error:
                _log.warning("%s: refused %s: %s", method, context.peer(), error)
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request cannot be parsed: {error}")
            return behaviour(parsed, context)

        return make(act, None, handler.response_serializer)


def _address(peer: str) -> str:
    """An address such as `ipv4:10.0.0.1:4711`, without its port."""
    return peer.rpartition(":")[0]


def _parsed(
    method: str, parse: Callable[[bytes], Any], frames: Iterator[bytes], context: Any
) -> Iterator[Any]:
    for data in frames:
        try:
            request = parse(data)
        except DecodeError as error:
            _log.warning("%s: refused %s: %s", method, context.peer(), error)
            raise ProtocolError(f"a request of the stream cannot be parsed: {error}") from None
        yield request


__all__ = ["BURST", "CALLS_PER_SECOND", "Guard", "Rate"]
