"""A real HAProxy with many clients, its backend, its ports and its end, without Ray."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
import time
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
from support.fronted_app import (
    KEY,
    Fronted,
    assert_openai_error,
    exchange,
    free_port,
    fronted,
    parts,
    request,
)
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


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
        wait_until(lambda: len(front.app.paths) >= 2, seconds=20)
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


def test_ports_that_are_the_same_are_named(tmp_path: Path, open_front: Fronted) -> None:
    binary = haproxy_binary()
    assert binary is not None
    port = free_port()
    plan = replace(open_front.plan, folder=tmp_path, port=port, metrics_port=port)
    with pytest.raises(ConfigError, match=f"--port and listen.metrics_port are both {port}"):
        HaproxyProcess(plan, binary).start(())


def test_fewer_connections_than_are_set_are_told(
    open_front: Fronted, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = resource.RLIMIT_NOFILE
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024) if kind == limit else (0, 0))
    binary, told = haproxy_binary(), list[str]()
    assert binary is not None
    HaproxyProcess(open_front.plan, binary, tell=told.append)
    (line,) = told
    assert "412 connections" in line and "1024 open files" in line and "ulimit -n" in line


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
    "sent", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a part of the greeting"]
)
def test_a_handshake_that_does_not_come_ends_the_connection(tmp_path: Path, sent: bytes) -> None:
    make_certificates(tmp_path / "tls", days=1, ca_days=2)
    files = {"tls_certificate": tmp_path / "tls" / "tls.crt", "tls_key": tmp_path / "tls" / "tls.key"}
    folder = tmp_path / "front"
    folder.mkdir()
    with fronted(folder, stall_timeout=1.0, **files) as front, closing(front.connect()) as connection:
        connection.settimeout(30)  # HAProxy's own default would be no limit
        assert exchange(connection, sent) == b""


@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP"], ids=["nothing", "a part of the greeting"])
def test_a_client_of_grpc_that_says_nothing_is_cut_off(tmp_path: Path, sent: bytes) -> None:
    ports = {"grpc_port": free_port(), "grpc": f"127.0.0.1:{free_port()}"}
    limits = {"stall_timeout": 1.0, "header_timeout": 1.0}
    with (
        fronted(tmp_path, change=lambda plan: replace(plan, **ports), **limits),
        closing(socket.create_connection(("127.0.0.1", ports["grpc_port"]), timeout=30)) as connection,
    ):
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 16):  # an HTTP/2 error may come first
                pass


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
