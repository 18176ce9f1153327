"""What of a real HAProxy needs an API key, and how keys are exchanged, without Ray."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from support.fronted_app import (
    KEY,
    LARGEST,
    Fronted,
    assert_openai_error,
    digests,
    parts,
    request,
)

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (None, 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY},x", 401),
        (f"Bearer {next(iter(digests(KEY)))}", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (f"BEARER   {KEY} ", 200),
        ("Bearer second-key", 200),
    ],
)
def test_a_key_is_a_bearer_token_in_any_case(front: Fronted, sent: str | None, status: int) -> None:
    headers = [] if sent is None else [f"Authorization: {sent}"]
    answer = front.raw(request("/v1/models", *headers))
    assert parts(answer)[0] == status
    if status == 401:
        assert assert_openai_error(answer, 401, "invalid_api_key")["www-authenticate"] == "Bearer"


def test_two_keys_in_one_request_are_refused(front: Fronted) -> None:
    both = (f"Authorization: Bearer {KEY}", "Authorization: Bearer wrong")
    for headers in (both, both[::-1], (both[0], both[0])):
        assert front.status(request("/v1/models", *headers)) == 401


@pytest.mark.parametrize("path", ["/", "/metrics", "/docs", "/redoc", "/openapi.json", "/-/routes"])
def test_every_other_path_needs_the_key(front: Fronted, path: str) -> None:
    assert front.status(request(path)) == 401
    assert front.status(request(path, f"Authorization: Bearer {KEY}")) == 200


@pytest.mark.parametrize("path", ["/health", "/-/healthz", "/health?a=b", "http://served/health"])
def test_health_needs_no_key_and_is_passed_on_as_compared(front: Fronted, path: str) -> None:
    status, _, body = parts(front.raw(request(path)))
    assert status == 200
    assert json.loads(body)["path"] in ("/health", "/-/healthz")


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/health/../v1/models", "/%68ealth", "/HEALTH", "/health;x"]
)
def test_what_resembles_health_needs_a_key(front: Fronted, path: str) -> None:
    assert front.status(request(path)) == 401


def test_no_byte_of_a_body_is_read_without_a_key(front: Fronted) -> None:
    before = front.app.read
    with closing(front.connect()) as connection:
        head = f"POST /echo HTTP/1.1\r\nHost: served\r\nContent-Length: {LARGEST}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401")
    assert front.app.read == before


@pytest.mark.parametrize("field", [f"Content-Length: {LARGEST}", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("path", "method", "of_metrics"),
    [("/health", "POST", False), ("/-/healthz", "GET", False), ("/metrics", "GET", True)],
)
def test_what_needs_no_key_has_no_body(
    front: Fronted, path: str, method: str, of_metrics: bool, field: str
) -> None:
    read, paths = front.app.read, len(front.app.paths)
    with closing(front.connect(front.plan.metrics_port if of_metrics else None)) as connection:
        connection.sendall(request(path, field, method=method))
        answer = b""
        while b"}}" not in answer:
            part = connection.recv(1 << 16)
            assert part, answer
            answer += part
    assert_openai_error(answer, 413, "body_too_large")
    assert (front.app.read, len(front.app.paths)) == (read, paths)


def test_digests_are_exchanged_while_it_runs(front: Fronted) -> None:
    before = front.process.pid
    try:
        front.process.exchange_digests(digests("third-key"))
        assert front.status(request("/v1/models", "Authorization: Bearer third-key")) == 200
        assert front.status(request("/v1/models", f"Authorization: Bearer {KEY}")) == 401
    finally:
        front.process.exchange_digests(digests(KEY, "second-key"))
    assert front.status(request("/v1/models", f"Authorization: Bearer {KEY}")) == 200
    assert front.process.pid == before


def test_its_files_are_private_and_hold_no_key(front: Fronted) -> None:
    for file in front.plan.folder.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file
        if file.is_file():
            assert KEY not in file.read_text()


def test_the_port_for_metrics_needs_no_key_and_has_nothing_else(front: Fronted) -> None:
    port = front.plan.metrics_port
    status, _, body = parts(front.raw(request("/metrics"), port=port))
    assert status == 200
    assert json.loads(body)["headers"]["x-raymoe-front"] == front.plan.token
    assert front.status(request("/health"), port=port) == 200
    assert front.status(request("/v1/models", f"Authorization: Bearer {KEY}"), port=port) == 404
    assert front.status(request("/metrics", method="POST"), port=port) == 405


def test_a_client_cannot_say_that_it_comes_from_the_port_for_metrics(front: Fronted) -> None:
    forged = (f"Authorization: Bearer {KEY}", f"X-Raymoe-Front: {front.plan.token}")
    told = json.loads(parts(front.raw(request("/echo", *forged)))[2])
    assert "x-raymoe-front" not in told["headers"]
