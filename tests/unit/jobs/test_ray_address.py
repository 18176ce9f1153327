"""What `auto` stands for, and the check that a Ray cluster answers at an address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from errors import ConfigError, ResourceError
from jobs.fleet import ray_address
from jobs.fleet.ray_address import only_address, requires_token, running_address


@contextmanager
def _control_service(code: grpc.StatusCode | None) -> Iterator[str]:
    """A gRPC server that answers like Ray's control service with this code; with None it has no methods."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not grpc.StatusCode.OK:
            context.abort(code, "as asked for")
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    if code is not None:
        handlers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers)]
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def _web_server() -> Iterator[str]:
    """A listener that answers every connection in HTTP 1.1, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=run, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without clusters, on which Ray keeps its files in `tmp_path`."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_address, "local_addresses", lambda: [])
    monkeypatch.setattr(ray_address, "fit_token_mode", lambda required: None)  # which changes the process


def _record(folder: Path, address: str) -> None:
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address, encoding="utf-8")


def test_a_cluster_that_answers_is_taken(tmp_path: Path) -> None:
    with (
        _control_service(grpc.StatusCode.UNAUTHENTICATED) as secured,
        _control_service(grpc.StatusCode.OK) as address,
    ):
        assert requires_token(secured)
        assert requires_token(address) is False
        _record(tmp_path, address)
        assert running_address(None) == running_address("auto") == running_address(address) == address


_MODES = """
import os, sys
from ray._raylet import get_authentication_mode
from jobs.fleet.ray_address import running_address
for address in sys.argv[1:]:
    running_address(address)
    print(os.environ["RAY_AUTH_MODE"], int(get_authentication_mode()))
"""


@pytest.mark.parametrize("given", [None, "disabled", "token"])
def test_the_token_is_used_where_a_cluster_requires_it(tmp_path: Path, given: str | None) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of an earlier cluster", encoding="utf-8")
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("RAY_AUTH_MODE", None)
    if given is not None:
        env["RAY_AUTH_MODE"] = given
    with (
        _control_service(grpc.StatusCode.UNAUTHENTICATED) as secured,
        _control_service(grpc.StatusCode.OK) as open_to_all,
    ):
        told = subprocess.run(
            [sys.executable, "-c", _MODES, open_to_all, secured, open_to_all],
            env=env,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.splitlines()
    modes = {"disabled": "disabled 0", "token": "token 1"}
    assert told == [modes[given or mode] for mode in ("disabled", "token", "disabled")]


@pytest.mark.parametrize("auto", [True, False])
def test_a_stale_address_is_refused_at_once(tmp_path: Path, auto: bool) -> None:
    stale = _closed()
    _record(tmp_path, stale)
    with pytest.raises(ResourceError, match=f"no Ray cluster at {stale}"):
        running_address("auto" if auto else stale)


def test_another_service_at_the_address_is_no_cluster(tmp_path: Path) -> None:
    with _control_service(None) as other, pytest.raises(ResourceError, match="UNIMPLEMENTED"):
        requires_token(other)
    with _web_server() as web:
        _record(tmp_path, web)
        with pytest.raises(ResourceError, match=f"{web} does not answer as a Ray cluster"):
            running_address("auto")


def test_one_of_several_clusters_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with _control_service(grpc.StatusCode.OK) as first, _control_service(grpc.StatusCode.OK) as second:
        monkeypatch.setattr(ray_address, "local_addresses", lambda: [first, second])
        with pytest.raises(ConfigError, match=f"2 Ray clusters .*{first}, {second}; say which"):
            running_address("auto")
        _record(tmp_path, second)  # `ray start` began this one last
        assert running_address("auto") == second
        monkeypatch.setenv("RAY_ADDRESS", first)
        assert running_address("auto") == running_address(None) == only_address(None) == first
        assert running_address("") == only_address("") == first


def test_a_command_never_takes_one_of_several_clusters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with _control_service(grpc.StatusCode.OK) as first, _control_service(grpc.StatusCode.OK) as second:
        _record(tmp_path, second)
        monkeypatch.setattr(ray_address, "local_addresses", lambda: [first, second])
        with pytest.raises(ConfigError, match=f"2 Ray clusters .*name one with --address: {first}, {second}"):
            only_address(None)
        assert only_address(first) == first
        monkeypatch.setattr(ray_address, "local_addresses", lambda: [second])
        assert only_address(None) == second


def test_no_cluster_is_said_as_such() -> None:
    with pytest.raises(ResourceError, match="no Ray cluster runs on this machine"):
        running_address("auto")
