"""The check of the API key before anything else of a request is looked at."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api.api_errors import ApiError
from jobs.api.backend import Backend
from jobs.api.body_limit import has_body

OPEN_PATHS = ("/health", "/-/healthz")
"""Paths that need no API key."""

FRONT_HEADER = "x-raymoe-front"
"""Header field with which the front marks requests that came by its port for metrics, which needs no key."""

_METRICS = "/metrics"


class KeyCheck:
    """ASGI middleware that answers 401 to requests without a valid API key, if there are keys.

    Requests that need none may have no body, which would be read for anybody; they get 413.

    Args:
        app: The application that gets all other requests.
        find: Returns the backend of this process.
    """

    def __init__(self, app: ASGIApp, find: Callable[[], Backend]) -> None:
        self._app, self._find = app, find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        if path in OPEN_PATHS or (path == _METRICS and self._from_front(headers)):
            if has_body(headers):
                raise ApiError(413, "requests to this path have no body", code="body_too_large")
            return
        given_keys = headers.getlist("authorization")
        self._find().check_key(given_keys[0] if len(given_keys) == 1 else None)

    def _from_front(self, headers: Headers) -> bool:
        """Whether a request came by the front's port for metrics."""
        given, token = headers.get(FRONT_HEADER), self._find().front_token
        if given is None or token is None:
            return False
        return hmac.compare_digest(given.encode("latin-1", "replace"), token.encode())


__all__ = ["FRONT_HEADER", "OPEN_PATHS", "KeyCheck"]
