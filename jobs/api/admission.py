"""The requests in progress, and the refusal of further ones while the server shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api.api_errors import ApiError

_RETRY_SECONDS = 5
_WHEN_CLOSING = ("/metrics",)  # paths that are answered until the end


class Admission:
    """Counts requests in progress, and admits no more once it is closed; used in one event loop.

    Attributes:
        closed: Whether requests are refused.
    """

    def __init__(self) -> None:
        self.closed = False
        self._open = 0
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Refuse all further requests."""
        self.closed = True
        self._changed.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request as in progress within the context.

        Raises:
            ApiError: Requests are refused.
        """
        if self.closed:
            raise _closing()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._changed.set()

    async def drained(self) -> None:
        """Return when requests are refused and none is in progress."""
        while not self.closed or self._open:
            self._changed.clear()
            await self._changed.wait()


class AdmissionGate:
    """ASGI middleware that admits requests, and answers 503 to those that are refused.

    Args:
        app: The application.
        find: Returns the admission of this process.
    """

    def __init__(self, app: ASGIApp, find: Callable[[], Admission]) -> None:
        self._app, self._find = app, find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in _WHEN_CLOSING:
            await self._app(scope, receive, send)
            return
        admission = self._find()
        if admission.closed:
            await _closing().response()(scope, receive, send)
            return
        with admission.request():
            await self._app(scope, receive, send)


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=_RETRY_SECONDS)


__all__ = ["Admission", "AdmissionGate"]
