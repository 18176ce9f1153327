"""The check of the API key before anything else of a request is looked at."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api.api_errors import ApiError
from jobs.api.backend import Backend

OPEN_PATHS = ("/health", "/-/healthz")
"""Paths that need no API key."""

FRONT_HEADER = "x-raymoe-front"
"""Header field with which the front marks requests that came by its port for metrics, which needs no key."""

_METRICS = "/metrics"


class KeyCheck:
    """ASGI middleware that answers 401 to requests without a valid API key, if there are keys.

    Args:
        app: The application that gets all other requests.
        find: Returns the backend of this process.
    """

    def __init__(self, app: ASGIApp, find: Callable[[], Backend]) -> None:
        self._app, self._find = app, find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        backend, token = self._find(), headers.get(FRONT_HEADER)
        if path == _METRICS and token is not None and backend.front_token is not None:
            given = token.encode("latin-1", "replace")
            if hmac.compare_digest(given, backend.front_token.encode()):
                return
        given_keys = headers.getlist("authorization")
        backend.check_key(given_keys[0] if len(given_keys) == 1 else None)


__all__ = ["FRONT_HEADER", "OPEN_PATHS", "KeyCheck"]
