"""Refuses request bodies that are too large, before they are read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api.api_errors import ApiError

MAX_BYTES = 16 << 20


class BodyLimit:
    """ASGI middleware that answers 413 to bodies of more than `MAX_BYTES`, by header or by what arrives.

    Args:
        app: The application that gets all other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        refusal = ApiError(413, f"the body is too large; {MAX_BYTES} bytes at most", code="body_too_large")
        announced = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        # Only digits are parsed: int() accepts other forms too, and raises for thousands of digits.
        if (
            announced.isascii()
            and announced.isdigit()
            and (len(announced) > 18 or int(announced) > MAX_BYTES)
        ):
            await refusal.response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BYTES:
                raise refusal
            return message

        async def unless_refused(message: Message) -> None:
            if taken <= MAX_BYTES:  # else it is the application's error for an incomplete body
                await send(message)

        try:
            await self._app(scope, counted, unless_refused)
        except ApiError as error:
            if error is not refusal:
                raise
        if taken > MAX_BYTES:
            await refusal.response()(scope, receive, send)


__all__ = ["MAX_BYTES", "BodyLimit"]
