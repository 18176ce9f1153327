"""Lines that gRPC's C library writes to stderr, in the process of a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jobs.cli import app, main

# In place of the command: a call to a server that announces the end of its connection (RFC 9113, 6.8).
_COMMAND = """
import socket, struct, threading
from jobs.cli import app, main

def serve(listener):
    connection, _ = listener.accept()
    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # SETTINGS
    connection.recv(4096)
    connection.sendall(bytes([0, 0, 8, 7, 0, 0, 0, 0, 0]) + struct.pack(">II", 0, 2))  # GOAWAY
    connection.recv(4096)

def command():
    import grpc
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    with grpc.insecure_channel("127.0.0.1:%d" % listener.getsockname()[1]) as channel:
        try:
            channel.unary_unary("/package.Service/Method", None, None)(b"", timeout=0.5)
        except grpc.RpcError:
            pass

app.app = command
main.main()
"""


def test_lines_about_connections_are_not_shown() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND], capture_output=True, text=True, timeout=100, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("options", "level"), [([], "NONE"), (["--debug"], None)])
def test_debug_shows_them(monkeypatch: pytest.MonkeyPatch, options: list[str], level: str | None) -> None:
    monkeypatch.setattr(app, "app", lambda: None)
    monkeypatch.setattr(sys, "argv", ["raymoe", "status", *options])
    monkeypatch.setenv("GRPC_VERBOSITY", "")  # so that its value is restored
    monkeypatch.delenv("GRPC_VERBOSITY")
    main.main()
    assert os.environ.get("GRPC_VERBOSITY") == level
