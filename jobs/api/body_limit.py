"""Reads request bodies within limits of size, time and memory, before anything parses them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

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
_RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyBounds:
    """Bounds of the bodies of one process.

    Attributes:
        memory: The memory for bodies.
        rate: Bytes per second that a client has to send, on average after some seconds.
        values: Values that a body may have, since parsing them holds up all other requests.
    """

    memory: BodyMemory
    rate: float
    values: int


class BodyLimit:
    """ASGI middleware that answers 413, 408, 400 or 503 to bodies that take too much, and passes on others.

    What a body takes in memory, parsed, is held from the process's `BodyMemory` until its request has ended.

    Args:
        app: The application that gets all other requests.
        bounds: Returns the bounds of bodies.
    """

    def __init__(self, app: ASGIApp, bounds: Callable[[], BodyBounds]) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        announced = headers.get("content-length", "")
        if "transfer-encoding" not in headers and announced in ("", "0"):
            await self._app(scope, receive, send)
            return
        bounds = self._bounds()
        try:
            _check_announced(announced)
            body = await _read(receive, bounds.rate)
            if body is None:  # the client has disconnected
                return
            cost = await _cost(body, bounds)
            await _take(bounds.memory, cost)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, _again(body, receive), send)
        finally:
            bounds.memory.give_back(cost.memory)


async def _read(receive: Receive, rate: float) -> bytes | None:
    """The whole body; None if the client disconnects before its end.

    Raises:
        ApiError: It is too large, or comes too slowly.
    """
    began, taken, parts = time.monotonic(), 0, []
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
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _take(memory: BodyMemory, cost: BodyCost) -> None:
    try:
        await memory.take(cost.memory)
    except TimeoutError:
        raise ApiError(
            503,
            "other requests take the memory for request bodies; come back later",
            code="overloaded",
            retry_after=_RETRY_SECONDS,
        ) from None


def _check_announced(announced: str) -> None:
    # Only digits are parsed: int() accepts other forms too, and raises for thousands of digits.
    digits = announced.isascii() and announced.isdigit()
    if digits and (len(announced) > 18 or int(announced) > MAX_BYTES):
        raise _too_large()


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


__all__ = ["MAX_BYTES", "MAX_DEPTH", "BodyBounds", "BodyLimit"]
