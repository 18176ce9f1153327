"""Sizes, times and shapes of requests that a real HAProxy passes on or refuses, without Ray."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing

import pytest

from jobs.serving.front_config import FrontConfig
from support.fronted_app import (
    LARGEST,
    Fronted,
    assert_openai_error,
    exchange,
    parts,
    request,
)
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


def test_a_body_of_the_limit_is_passed_on_and_a_larger_one_refused(open_front: Fronted) -> None:
    body = b"x" * LARGEST
    answer = open_front.raw(request(method="POST", body=body))
    assert json.loads(parts(answer)[2])["size"] == LARGEST
    for announced in (LARGEST + 1, 10**12, 2**63 - 1):
        head = f"POST /echo HTTP/1.1\r\nHost: served\r\nContent-Length: {announced}\r\n\r\n"
        with closing(open_front.connect()) as connection:
            assert_openai_error(exchange_head(connection, head.encode()), 413, "body_too_large")


def exchange_head(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    said = b""
    while b"}}" not in said:
        part = connection.recv(1 << 16)
        assert part, said
        said += part
    return said


def test_a_chunked_body_is_passed_on(open_front: Fronted) -> None:
    head = "POST /echo HTTP/1.1\r\nHost: served\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = open_front.raw(head.encode() + b"5\r\nhello\r\n" * 100 + b"0\r\n\r\n")
    assert json.loads(parts(answer)[2])["size"] == 500


def test_a_header_that_is_too_large_or_has_too_many_fields_is_refused(open_front: Fronted) -> None:
    limits = FrontConfig()
    large = request("/echo", "X-Large: " + "x" * limits.header_bytes)
    assert open_front.status(large) == 400
    assert open_front.status(request("/echo", "X-Large: " + "x" * (limits.header_bytes - 500))) == 200
    many = request("/echo", *(f"X-{number}: 1" for number in range(limits.header_count + 1)))
    assert open_front.status(many) == 400
    long = request("/" + "x" * limits.header_bytes)
    assert open_front.status(long) == 400


def test_a_header_that_is_not_sent_in_time_ends_the_connection(open_front: Fronted) -> None:
    began = time.monotonic()
    assert open_front.status(b"GET /echo HTTP/1.1\r\nHost:") == 408
    assert open_front.raw(b"") == b""
    with closing(open_front.connect()) as connection:  # a field now and then gains no time
        connection.settimeout(0.1)
        connection.sendall(b"GET /echo HTTP/1.1\r\n")
        said = b""
        while time.monotonic() - began < 20 and not said:
            try:
                connection.sendall(b"X-A: b\r\n")
                said = connection.recv(1 << 16)
            except TimeoutError:
                continue
        assert said.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 10


def test_a_body_that_stalls_ends_the_connection(open_front: Fronted) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: served\r\nContent-Length: 1000\r\n\r\nabc"
    assert parts(open_front.raw(head))[0] in (400, 408)


def test_a_client_that_does_not_read_is_cut_off(open_front: Fronted) -> None:
    open_front.app.disconnected.clear()
    with closing(open_front.connect()) as connection:
        connection.sendall(request("/flood"))
        assert open_front.app.disconnected.wait(20)
        assert open_front.app.sent < 64 << 20  # no more than the buffers of the connections


def test_an_idle_connection_is_closed(open_front: Fronted) -> None:
    with closing(open_front.connect()) as connection:
        connection.sendall(request().replace(b"Connection: close\r\n", b""))
        answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200")
        assert connection.recv(1 << 16) == b""


def test_an_answer_may_be_silent_for_longer_than_a_client(open_front: Fronted) -> None:
    with closing(open_front.connect()) as connection:
        connection.sendall(request("/events"))
        quiet = 2.5 * open_front.plan.limits.stall_timeout
        connection.settimeout(quiet)
        with pytest.raises(TimeoutError):
            while connection.recv(1 << 16):
                pass
        connection.settimeout(20)
        open_front.app.go.release(3)
        said = b""
        while part := connection.recv(1 << 16):
            said += part
        assert b"data: 2" in said


def test_events_come_one_by_one(open_front: Fronted) -> None:
    with closing(open_front.connect()) as connection:
        connection.sendall(request("/events"))
        for number in range(3):
            open_front.app.go.release()
            said = b""
            while b"data:" not in said:
                said += connection.recv(1 << 16)
            assert b"data: %d\n\n" % number in said
            assert b"data: %d" % (number + 1) not in said


def test_a_client_that_disconnects_is_noticed_by_the_application(open_front: Fronted) -> None:
    open_front.app.disconnected.clear()
    connection = open_front.connect()
    connection.sendall(request("/wait").replace(b"Connection: close\r\n", b""))
    wait_until(lambda: "/wait" in open_front.app.paths)
    connection.close()
    assert open_front.app.disconnected.wait(20)


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [
        (404, 503, "unavailable"),
        (503, 503, "unavailable"),
        (500, 500, "request_failed"),
        (400, 400, "bad_request"),
    ],
)
def test_pages_of_the_proxy_behind_get_the_shape_of_errors(
    open_front: Fronted, status: int, told: int, code: str
) -> None:
    fields = assert_openai_error(open_front.raw(request(f"/plain/{status}")), told, code)
    assert ("retry-after" in fields) == (told == 503)
    head = open_front.raw(request(f"/plain/{status}", method="HEAD"))
    assert parts(head)[0] == told
    assert parts(head)[2] == b""


def test_head_and_expectations(open_front: Fronted) -> None:
    status, fields, body = parts(open_front.raw(request(method="HEAD")))
    assert (status, body) == (200, b"")
    assert int(fields["content-length"]) > 0
    with closing(open_front.connect()) as connection:
        head = (
            b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        )
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
        assert json.loads(parts(exchange(connection, b"hello"))[2])["size"] == 5


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
def test_methods_of_proxies_are_refused(open_front: Fronted, method: str) -> None:
    path = "served:80" if method == "CONNECT" else "/"
    assert_openai_error(open_front.raw(request(path, method=method)), 405, "method_not_allowed")


def test_no_upgrade_and_no_http2_on_the_port_for_http(open_front: Fronted) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    answer = open_front.raw(request("/echo", *upgrade))
    assert parts(answer)[0] in (200, 400)
    assert b"101" not in answer.split(b"\r\n")[0]
    assert not open_front.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").startswith(b"\x00")


@pytest.mark.parametrize(
    "data",
    [
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
        b"GET /ec\0ho HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /echo HTTP/9.9\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_ambiguous_requests_never_become_two(open_front: Fronted, data: bytes) -> None:
    said = open_front.raw(data)
    assert said.count(b"HTTP/1.1 ") == 1 or not said.startswith(b"HTTP/1.1 2")
    assert said.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4", b"HTTP/1.1 200"))
    assert "/smuggled" not in open_front.app.paths
