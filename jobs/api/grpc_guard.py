"""What a stranger's gRPC call meets first: the key before a byte of its message, and bounds of reading it.

A handler of gRPC for one message gets it read and parsed before it runs. So every handler is replaced by one
for streams, which reads nothing by itself: it checks the API key, then takes a place among the messages that
are read at a time, and reads and parses within a time limit. Until then a call holds no more than its
window of flow control.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from jobs.api.api_keys import ApiKeys
from jobs.api.body_limit import MAX_BYTES

OPEN: Final = "/grpc.health.v1.Health/"
"""Begins the methods that need no key, as `/health` needs none."""
READING, READING_STREAMS, READING_OPEN = 8, 4, 4
"""Messages that are read at a time, each of `MAX_BYTES` at most: of callers with a key, of their streams of
messages (server reflection), whose next one may be late, and of others."""
READ_SECONDS, OPEN_SECONDS = 10.0, 2.0
"""Time that a message has to arrive, and to wait for its place."""
OPEN_CALLS = 256
"""Calls without a key at a time, such as those that watch the health."""

_WINDOW = 64 << 10  # bytes of a stream that are taken from the connection before it is read
SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MAX_BYTES),
    ("grpc.max_send_message_length", MAX_BYTES),
    # A compressed message is as large as its sender likes, once it is inflated.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.http2.lookahead_bytes", _WINDOW),
    ("grpc.http2.bdp_probe", 0),  # it would widen the window
    # A connection that says nothing, or whose client is gone, is closed.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.enable_http_proxy", 0),
)
"""Settings of a server that strangers reach."""

_DETAILS = 500  # characters
_Details = grpc.HandlerCallDetails
_END: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it


class CallRefused(Exception):
    """Ends a call with a status, in place of `context.abort`.

    The library (grpcio 1.85) keeps the exception of an abort for good, with all that its traceback refers to,
    such as the messages of the call.

    Args:
        code: Status.
        details: Description for people; of long ones the beginning is sent.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        # They go out as metadata, of which clients take 8 KiB, with up to 12 bytes for a character.
        self.code, self.details = code, details[:_DETAILS]

    def end(self, context: Any) -> None:
        """Set the status of a call that returns now."""
        context.set_code(self.code)
        context.set_details(self.details)


class StrangerGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the stubs alone
    """Replaces all handlers of a server; used in one event loop.

    Args:
        keys: API keys, one of which a call must carry.
    """

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self._reading = asyncio.Semaphore(READING)
        self._reading_streams = asyncio.Semaphore(READING_STREAMS)
        self._reading_open = asyncio.Semaphore(READING_OPEN)
        self._open_calls = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: _Details
    ) -> Any:
        """The handler of a call; None if the method is not served."""
        if handler_call_details.method.startswith(OPEN):
            if self._open_calls >= OPEN_CALLS:
                return _refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls without an API key")
            found = await continuation(handler_call_details)
            return None if found is None else self._guarded(found, self._reading_open, OPEN_SECONDS)
        metadata: Any = handler_call_details.invocation_metadata
        sent = [value for name, value in metadata if name == "authorization"]
        if not self._keys.allows(sent[0] if len(sent) == 1 else None):
            return _refusing(
                grpc.StatusCode.UNAUTHENTICATED,
                "the API key is missing or wrong; send the metadata authorization: Bearer KEY",
            )
        found = await continuation(handler_call_details)
        if found is None:
            return None
        places = self._reading_streams if found.request_streaming else self._reading
        return self._guarded(found, places, READ_SECONDS)

    def _guarded(self, handler: Any, places: asyncio.Semaphore, seconds: float) -> Any:
        parse = handler.request_deserializer
        isopen = places is self._reading_open

        async def messages(context: Any) -> AsyncGenerator[Any, None]:
            while (message := await _one(context, parse, places, seconds)) is not None:
                yield message

        async def act(_: Any, context: Any) -> AsyncGenerator[Any, None]:
            self._open_calls += isopen
            try:
                async with aclosing(_answers(handler, messages(context), context)) as answers:
                    async for answer in answers:
                        yield answer
            except CallRefused as error:
                error.end(context)
            finally:
                self._open_calls -= isopen

        return grpc.stream_stream_rpc_method_handler(act, None, handler.response_serializer)


def _refusing(code: grpc.StatusCode, details: str) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        CallRefused(code, details).end(context)

    return grpc.stream_stream_rpc_method_handler(refuse, None, None)


async def _answers(
    handler: Any, messages: AsyncGenerator[Any, None], context: Any
) -> AsyncGenerator[Any, None]:
    """What a handler of any kind answers."""
    asked: Any = messages
    if not handler.request_streaming:
        asked = await anext(messages, None)
        if asked is None:
            raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    if not handler.response_streaming:
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        yield await behaviour(asked, context)
        return
    behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
    answers: AsyncIterator[Any] = behaviour(asked, context)
    async for answer in answers:
        yield answer


async def _one(context: Any, parse: Any, places: asyncio.Semaphore, seconds: float) -> Any:
    """The next message of a call; None at its end.

    A place is held while bytes may arrive, and until they are parsed into a message, which is larger.
    """
    try:
        async with asyncio.timeout(seconds), places:
            data = await context.read()
            return None if data is _END else parse(data)
    except TimeoutError:
        text = f"the message was not complete within {seconds:g} s"
        raise CallRefused(grpc.StatusCode.RESOURCE_EXHAUSTED, text) from None
    except DecodeError as error:
        text = f"the message cannot be parsed: {error}"
        raise CallRefused(grpc.StatusCode.INVALID_ARGUMENT, text) from None


__all__ = ["OPEN", "OPEN_CALLS", "SERVER_OPTIONS", "CallRefused", "StrangerGuard"]
