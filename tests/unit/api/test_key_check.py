"""The key of a request is checked before its body is read, and on all paths but a few."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.api.api_keys import ApiKeys
from support.api_server import Served


def test_no_byte_of_a_body_is_read_without_a_key(served: Served) -> None:
    backend = served.backend
    before, backend.keys = backend.keys, ApiKeys(["a-secret-of-the-test"])
    received: list[str] = []

    async def ask() -> int:
        """The status of a request whose body is asked for only if it is wanted."""
        status = 0

        async def receive() -> Any:
            received.append("asked")
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(b"content-length", b"2"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await served.client.app(scope, receive, send)
        return status

    try:
        status = asyncio.run(ask())
    finally:
        backend.keys = before
    assert status == 401
    assert received == []


@pytest.mark.parametrize("field", [{"Content-Length": "5"}, {"Transfer-Encoding": "chunked"}])
def test_what_needs_no_key_has_no_body(served: Served, field: dict[str, str]) -> None:
    backend = served.backend
    backend.front_token = "front-token"
    try:
        for path, more in (("/health", {}), ("/metrics", {"x-raymoe-front": "front-token"})):
            answer = served.client.request("GET", path, content=b"hello", headers={**field, **more})
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
            assert served.client.get(path, headers=more).status_code == 200
    finally:
        backend.front_token = None


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/health", None, 200),
        ("/metrics", None, 401),
        ("/metrics", "front-token", 200),
        ("/metrics", "another", 401),
        ("/v1/models", "front-token", 401),
        ("/docs", None, 401),
        ("/openapi.json", None, 401),
        ("/nowhere", None, 401),
    ],
)
def test_paths_need_the_key_but_health_and_what_the_front_vouches_for(
    served: Served, path: str, header: str | None, status: int
) -> None:
    backend = served.backend
    before, backend.keys = backend.keys, ApiKeys(["a-secret-of-the-test"])
    backend.front_token = "front-token"
    try:
        answer = served.client.get(path, headers={} if header is None else {"x-raymoe-front": header})
    finally:
        backend.keys, backend.front_token = before, None
    assert answer.status_code == status
