"""Reads request bodies within limits of size, time and memory, before anything parses them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api.api_errors import ApiError
from jobs.api.parsing_memory.body_cost import BodyCost, body_cost
from jobs.api.parsing_memory.body_memory import BodyMemory

MAX_BYTES = 16 << 20
MAX_DEPTH = 128
"""Objects and arrays that a body may have within each other."""

_GRACE_SECONDS = 10.0  # before the rate of a body is looked at
_LARGE = 256 << 10  # bytes, which take a millisecond to look through
_SMALL = 64 << 10  # bytes, which a connection's own buffers take as well
_RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyBounds:
    """Bounds of the bodies of one process.

    Attributes:
        arriving: The memory for bodies that are read.
        memory: The memory for bodies that are parsed.
        rate: Bytes per second that a client has to send, on average after some seconds.
        values: Values that a body may have, since parsing them holds up all other requests.
    """

    arriving: BodyMemory
    memory: BodyMemory
    rate: float
    values: int


class BodyLimit:
    """ASGI middleware that answers 413, 408, 400 or 503 to bodies that take too much, and passes on others.

    A body of more than 64 KiB has its part of the memory for arriving bodies before it is read, and never
    waits for it: Ray Serve reads the body of every request that is being handled, also of one that waits.
    What a body takes when it is parsed is held until its request has ended. It is estimated from the bytes as
    UTF-8, so a body in another encoding gets 400.

    Args:
        app: The application that gets all other requests.
        bounds: Returns the bounds of bodies.
    """

    def __init__(self, app: ASGIApp, bounds: Callable[[], BodyBounds]) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if not has_body(headers):
            await self._app(scope, receive, send)
            return
        bounds = self._bounds()
        try:
            announced = _announced(headers)
            with _Arrival(bounds.arriving) as arrival:
                body = await _read(receive, announced, bounds.rate, arrival)
                if body is None:  # the client has disconnected
                    return
                _check_encoding(body)
                cost = await _cost(body, bounds)
                await _take(bounds.memory, cost)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, _again(body, receive), send)
        finally:
            bounds.memory.give_back(cost.memory)


class _Arrival:
    """A context in which a body is read; its part of the memory for such bodies is given back at the end."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self._taken = memory, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.give_back(self._taken)

    def take(self, count: int) -> None:
        """Take the part of a body of so many bytes, unless it has one.

        Raises:
            ApiError: It is not free.
        """
        if self._taken or count <= _SMALL:
            return
        if not self._memory.take_free(count):
            raise _no_memory()
        self._taken = count


async def _read(receive: Receive, announced: int | None, rate: float, arrival: _Arrival) -> bytes | None:
    """The whole body; None if the client disconnects before its end.

    Args:
        announced: Bytes of the body; None if its size is not announced, which may be any.
        arrival: Holds its part of the memory.

    Raises:
        ApiError: It is too large, comes too slowly, or has no part of the memory.
    """
    began, taken, parts = time.monotonic(), 0, []
    arrival.take(announced or 0)
    while True:
        allowed = _GRACE_SECONDS + taken / rate
        try:
            message = await asyncio.wait_for(receive(), began + allowed - time.monotonic())
        except TimeoutError:
            raise ApiError(
                408,
                f"{taken} bytes of the body came within {allowed:.0f} s; send it faster",
                code="request_timeout",
            ) from None
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        taken += len(part)
        if taken > MAX_BYTES:
            raise _too_large()
        if taken > _SMALL:
            arrival.take(MAX_BYTES)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _take(memory: BodyMemory, cost: BodyCost) -> None:
    try:
        await memory.take(cost.memory)
    except TimeoutError:
        raise _no_memory() from None


def _no_memory() -> ApiError:
    return ApiError(
        503,
        "other requests take the memory for request bodies; come back later",
        code="overloaded",
        retry_after=_RETRY_SECONDS,
    )


def has_body(headers: Headers) -> bool:
    """Whether a request has a body, by its header."""
    return "transfer-encoding" in headers or headers.get("content-length", "") not in ("", "0")


def _announced(headers: Headers) -> int | None:
    """Bytes of a body by `Content-Length`; None if that is missing or malformed, or does not count.

    Raises:
        ApiError: They are too many.
    """
    header = headers.get("content-length", "")
    # Only digits are parsed: int() accepts other forms too, and raises for thousands of digits.
    if not (header.isascii() and header.isdigit()):
        return None
    if len(header) > 18 or int(header) > MAX_BYTES:
        raise _too_large()
    return None if "transfer-encoding" in headers else int(header)


def _check_encoding(body: bytes) -> None:
    """Refuse JSON that Python would read in another encoding, in which quotes and brackets are other bytes.

    RFC 8259 allows UTF-8 alone between systems.
    """
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise ApiError(400, f"the body is in {encoding.upper()}; send JSON in UTF-8", code="invalid_json")


async def _cost(body: bytes, bounds: BodyBounds) -> BodyCost:
    """What a body costs.

    Raises:
        ApiError: It costs more than there ever is, or is nested too deeply.
    """
    cost = await asyncio.to_thread(body_cost, body) if len(body) > _LARGE else body_cost(body)
    if cost.depth > MAX_DEPTH:
        raise ApiError(
            400, f"the body is nested more than {MAX_DEPTH} levels deep; flatten it", code="invalid_json"
        )
    most = bounds.memory.size
    if cost.values > bounds.values:
        raise ApiError(
            413,
            f"the body has {cost.values} values, and a request to this model has {bounds.values} at most",
            code="body_too_large",
        )
    if cost.memory > most:
        raise ApiError(
            413,
            f"the body has {cost.values} values, which would take {cost.memory >> 20} MiB of the "
            f"{most >> 20} MiB that all bodies have; split it",
            code="body_too_large",
        )
    return cost


def _too_large() -> ApiError:
    return ApiError(413, f"the body is too large; {MAX_BYTES} bytes at most", code="body_too_large")


def _again(body: bytes, receive: Receive) -> Receive:
    """The messages of a client whose body has been read."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


__all__ = ["MAX_BYTES", "MAX_DEPTH", "BodyBounds", "BodyLimit", "has_body"]
