"""A real HAProxy before a small application: keys, limits, errors, streams and its end, without Ray."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from errors import ConfigError, ResourceError
from jobs.serving.front.haproxy_process import HaproxyProcess, haproxy_binary
from jobs.serving.front_config import FrontConfig
from jobs.tools.certs import make_certificates
from support.fronted_app import LARGEST, Fronted, digests, exchange, free_port, fronted, request

pytestmark = pytest.mark.timeout(60)
KEY = "correct-horse-battery"


def parts(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, header fields and body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), fields, body


def assert_openai_error(answer: bytes, status: int, code: str) -> dict[str, str]:
    found, fields, body = parts(answer)
    assert found == status, answer
    assert fields["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return fields


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    """A front that needs a key and has a port for metrics."""
    folder = tmp_path_factory.mktemp("front")
    metrics = free_port()
    with fronted(folder, keys=(KEY, "second-key"), change=lambda p: replace(p, metrics_port=metrics)) as made:
        yield made


@pytest.fixture(scope="module")
def open_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    """A front without keys, with short times."""
    limits = {"header_timeout": 0.5, "stall_timeout": 1.0, "idle_timeout": 1.0}
    with fronted(tmp_path_factory.mktemp("open"), **limits) as made:
        yield made


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
    while "/wait" not in open_front.app.paths:
        time.sleep(0.01)
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


def test_connections_that_have_been_answered_give_way_when_many_are_open(tmp_path: Path) -> None:
    with ExitStack() as stack:
        front = stack.enter_context(
            fronted(tmp_path, connections=8, connections_per_address=100, header_timeout=60.0)
        )
        keep = request().replace(b"Connection: close\r\n", b"")
        held = [stack.enter_context(closing(front.connect())) for _ in range(5)]
        for connection in held:
            connection.sendall(keep)
            assert b"connection: close" not in connection.recv(1 << 16).lower()
        for _ in range(20):  # the sixth of eight, which is three quarters, is closed after its answer
            with closing(front.connect()) as late:
                status, fields, _ = parts(exchange(late, keep))
                assert (status, fields["connection"]) == (200, "close")
        held += [stack.enter_context(closing(front.connect())) for _ in range(3)]
        beyond = stack.enter_context(closing(front.connect()))
        beyond.sendall(request())
        beyond.settimeout(0.5)
        with pytest.raises(TimeoutError):  # it waits until another one is closed
            beyond.recv(1 << 16)
        held[0].close()
        beyond.settimeout(20)
        assert parts(exchange(beyond, b""))[0] == 200


def test_one_address_has_a_part_of_the_connections(tmp_path: Path) -> None:
    assert FrontConfig(connections=100).per_address == 50
    with ExitStack() as stack:
        front = stack.enter_context(fronted(tmp_path, connections=100, connections_per_address=3))
        held = [stack.enter_context(closing(front.connect())) for _ in range(3)]
        for connection in held:
            connection.sendall(request().replace(b"Connection: close\r\n", b""))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert front.raw(request()) == b""
        held[0].sendall(request())
        assert parts(exchange(held[0], b""))[0] == 200
        deadline = time.monotonic() + 20
        while not (said := front.raw(request())):  # the place of the closed one is free soon
            assert time.monotonic() < deadline
        assert parts(said)[0] == 200


def test_a_caller_has_a_rate(tmp_path: Path) -> None:
    with fronted(tmp_path, keys=(KEY, "second-key"), requests_per_minute=3) as front:
        asked = request("/v1/models", f"Authorization: Bearer {KEY}")
        assert [front.status(asked) for _ in range(3)] == [200] * 3
        fields = assert_openai_error(front.raw(asked), 429, "rate_limited")
        assert int(fields["retry-after"]) >= 1
        assert front.status(request("/v1/models", "Authorization: Bearer second-key")) == 200
        assert [front.status(request("/health")) for _ in range(5)] == [200] * 5


def test_large_bodies_wait_for_a_place(tmp_path: Path) -> None:
    """Bodies of more than 1 MiB: `body_memory` / 2 / 16 MiB at a time."""
    with ExitStack() as stack:
        front = stack.enter_context(fronted(tmp_path, body_memory=64 << 20))
        head = b"POST /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2000000\r\n\r\n"
        senders = [stack.enter_context(closing(front.connect())) for _ in range(3)]
        for sender in senders:
            sender.sendall(head + b"x" * 1000)
        deadline = time.monotonic() + 20
        while len(front.app.paths) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert front.status(request()) == 200  # small requests pass
        assert front.app.paths.count("/echo") == 3  # two large ones, and the small one
        for sender in senders[:2]:
            sender.sendall(b"x" * 1999000)
        for sender in senders[:2]:
            assert parts(exchange(sender, b""))[0] == 200
        assert parts(exchange(senders[2], b"x" * 1999000))[0] == 200


def test_while_nothing_is_behind_it_clients_get_503(tmp_path: Path) -> None:
    with fronted(tmp_path, change=lambda plan: replace(plan, http=f"127.0.0.1:{free_port()}")) as front:
        fields = assert_openai_error(front.raw(request()), 503, "unavailable")
        assert int(fields["retry-after"]) >= 1


def test_a_server_that_ends_before_its_answer_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ending:
        port = ending.getsockname()[1]

        def end_each() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = ending.accept()
                    connection.recv(1 << 16)
                    connection.close()

        thread = threading.Thread(target=end_each, daemon=True)
        thread.start()
        with fronted(tmp_path, change=lambda plan: replace(plan, http=f"127.0.0.1:{port}")) as front:
            for method in ("GET", "POST"):
                fields = assert_openai_error(front.raw(request(method=method)), 503, "unavailable")
                assert int(fields["retry-after"]) >= 1
        ending.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def test_a_call_of_grpc_needs_the_key(tmp_path: Path) -> None:
    ports = {"grpc_port": free_port(), "grpc": f"127.0.0.1:{free_port()}"}
    with ExitStack() as stack:
        front = stack.enter_context(
            fronted(tmp_path, keys=(KEY,), change=lambda plan: replace(plan, **ports))
        )
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{front.plan.grpc_port}"))
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", "Bearer wrong"),), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"bearer {KEY}"),), grpc.StatusCode.UNAVAILABLE),  # nothing is behind it
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/raymoe.v1.Generation/Generate")(b"", metadata=metadata, timeout=50)
            assert caught.value.code() is code
            assert ("API key" in caught.value.details()) == (code is grpc.StatusCode.UNAUTHENTICATED)


def test_it_stops_after_the_answers_under_way(tmp_path: Path) -> None:
    with fronted(tmp_path) as front, closing(front.connect()) as connection:
        connection.sendall(request("/events"))
        front.app.go.release()
        said = b""
        while b"data: 0" not in said:
            said += connection.recv(1 << 16)
        assert front.process.requests() == 1
        front.app.go.release(2)
        front.process.stop(grace=20)
        assert front.process.pid is None
        assert b"data: 2" in exchange(connection, b"")


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, open_front: Fronted) -> None:
    binary = haproxy_binary()
    assert binary is not None
    plan = replace(open_front.plan, folder=tmp_path)
    with pytest.raises(ResourceError, match=f"--port {plan.port} is not available") as caught:
        HaproxyProcess(plan, binary).start(())
    assert "\n" not in str(caught.value)


def test_tls_with_a_certificate_that_is_replaced(tmp_path: Path) -> None:

    make_certificates(tmp_path / "tls", days=1, ca_days=2)
    context = ssl.create_default_context(cafile=str(tmp_path / "tls" / "ca.crt"))
    context.check_hostname = False
    files = {"tls_certificate": tmp_path / "tls" / "tls.crt", "tls_key": tmp_path / "tls" / "tls.key"}
    folder = tmp_path / "front"
    folder.mkdir()
    with fronted(folder, **files) as front:

        def serial() -> tuple[int, str]:
            with context.wrap_socket(front.connect(), server_hostname="raymoe") as connection:
                shown: Any = connection.getpeercert()
                return parts(exchange(connection, request()))[0], shown["serialNumber"]

        status, before = serial()
        assert status == 200
        make_certificates(tmp_path / "tls", days=1, ca_days=2)
        front.process.exchange_certificate()
        status, after = serial()
        assert status == 200
        assert after != before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"header_bytes": 100}, "header_bytes"),
        ({"header_count": 5}, "header_count"),
        ({"body_memory": 1 << 20}, "body_memory"),
        ({"tls_key": "key.pem"}, "tls_certificate"),
    ],
)
def test_impossible_limits_name_their_field(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FrontConfig.from_dict(values)
