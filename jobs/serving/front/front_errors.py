"""The errors that the front answers by itself, in OpenAI's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus

RETRY_SECONDS = 5

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontError:
    """One answer of the front.

    Attributes:
        status: HTTP status.
        code: Identifier for programs.
        message: Description for people.
        headers: Further header fields.
    """

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> str:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error})

    def reply(self) -> str:
        """The answer as arguments of HAProxy's action `return`."""
        words = [f"status {self.status} content-type application/json string {quoted(self.body())}"]
        words += [f"hdr {name} {quoted(value)}" for name, value in self.headers]
        return " ".join(words)

    def page(self) -> str:
        """The whole answer as HAProxy sends it from an error file, also before a request could be read."""
        body = self.body()
        headers = (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *self.headers,
        )
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers), "", body])


def quoted(text: str) -> str:
    """A word of HAProxy's configuration that stands for exactly this text."""
    if "'" in text or any(ord(character) < 32 for character in text):
        raise ValueError(f"{text!r} cannot be quoted")
    return f"'{text}'"


_RETRY = (("Retry-After", str(RETRY_SECONDS)),)

BAD_REQUEST = FrontError(
    status=400, code="bad_request", message="the request is malformed or incomplete, or its header too large"
)
NO_KEY = FrontError(
    status=401,
    code="invalid_api_key",
    message="the API key is missing or wrong; send Authorization: Bearer KEY",
    headers=(("WWW-Authenticate", "Bearer"),),
)
NO_BODY = FrontError(status=413, code="body_too_large", message="requests to this path have no body")
NO_METHOD = FrontError(
    status=405,
    code="method_not_allowed",
    message="the method is not known here",
    headers=(("Allow", "GET, HEAD, POST"),),
)
NOT_HERE = FrontError(status=404, code="not_found", message="this port has /metrics and /health alone")
TOO_SLOW = FrontError(status=408, code="request_timeout", message="the request was not complete in time")
RATE_LIMITED = FrontError(
    status=429,
    code="rate_limited",
    message="too many requests in a minute; come back later",
    headers=(("Retry-After", "60"),),
)
FAILED = FrontError(status=500, code="request_failed", message="the server failed at this request")
AWAY = FrontError(
    status=503,
    code="unavailable",
    message="the server is starting, shutting down or overloaded; come back later",
    headers=_RETRY,
)
TOO_LATE = FrontError(status=504, code="engine_failed", message="the server did not answer in time")


def too_large(limit: int) -> FrontError:
    """The answer to bodies of more than `limit` bytes."""
    return FrontError(
        status=413, code="body_too_large", message=f"the body is too large; {limit} bytes at most"
    )


GENERAL = {400: BAD_REQUEST, 408: TOO_SLOW, 500: FAILED, 502: AWAY, 503: AWAY, 504: TOO_LATE}
"""What takes the place of HAProxy's own error pages, by their status; 502 is a server that broke off."""

__all__ = [
    "AWAY",
    "BAD_REQUEST",
    "FAILED",
    "GENERAL",
    "NOT_HERE",
    "NO_BODY",
    "NO_KEY",
    "NO_METHOD",
    "RATE_LIMITED",
    "RETRY_SECONDS",
    "FrontError",
    "quoted",
    "too_large",
]
