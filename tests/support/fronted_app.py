"""A front before a small ASGI application in this process, and raw connections to it."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import uvicorn

from jobs.serving.front.haproxy_config import FrontPlan
from jobs.serving.front.haproxy_process import HaproxyProcess, haproxy_binary
from jobs.serving.front_config import FrontConfig

LARGEST = 16 << 20
KEY = "correct-horse-battery"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class SmallApp:
    """An ASGI application that notes what reaches it.

    Attributes:
        paths: Paths of all requests.
        read: Bytes of bodies that were read.
        sent: Bytes of answers of `/flood`, which sends until its client disconnects.
        disconnected: Set when the client of `/wait` or `/flood` has disconnected.
        go: Lets `/wait` answer, and `/events` send its next event.
    """

    paths: list[str] = field(default_factory=list)
    read: int = 0
    sent: int = 0
    disconnected: threading.Event = field(default_factory=threading.Event)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        self.paths.append(path)
        if path == "/events":
            await self._events(send)
        elif path == "/wait":
            await self._wait(receive, send)
        elif path == "/flood":
            await self._flood(receive, send)
        elif path.startswith("/plain/"):
            await _answer(send, int(path.removeprefix("/plain/")), b"Path not found", b"text/plain")
        else:
            await self._echo(scope, receive, send)

    async def _echo(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            self.read += len(message.get("body", b""))
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        told = {"path": scope["path"], "method": scope["method"], "size": size, "headers": headers}
        await _answer(send, 200, json.dumps(told).encode(), b"application/json")

    async def _events(self, send: Any) -> None:
        await _start(send, 200, b"text/event-stream")
        for number in range(3):
            await asyncio.to_thread(self.go.acquire)
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _flood(self, receive: Any, send: Any) -> None:
        async def end() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        ended = asyncio.create_task(end())
        await _start(send, 200, b"text/plain")
        while not ended.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            self.sent += 65536
            await asyncio.sleep(0)
        self.disconnected.set()

    async def _wait(self, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            if not message.get("more_body"):
                released = asyncio.create_task(asyncio.to_thread(self.go.acquire, timeout=20))
                gone = asyncio.create_task(receive())
                await asyncio.wait({released, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not gone.done():
                    gone.cancel()
                    await _answer(send, 200, b"{}", b"application/json")
                    return
                break
        self.disconnected.set()


async def _start(send: Any, status: int, kind: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", kind), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _answer(send: Any, status: int, body: bytes, kind: bytes) -> None:
    await _start(send, status, kind, (b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.body", "body": body})


@contextmanager
def listening(app: Any) -> Iterator[int]:
    """An application that listens on a port of the loopback, in a thread."""
    config = uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    try:
        yield config.port
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@dataclass
class Fronted:
    """A running front, its application and its plan."""

    app: SmallApp
    plan: FrontPlan
    process: HaproxyProcess

    def connect(self, port: int | None = None) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port or self.plan.port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def raw(self, data: bytes, *, port: int | None = None) -> bytes:
        """All that the front says to these bytes until it closes the connection."""
        try:
            with closing(self.connect(port)) as connection:
                return exchange(connection, data)
        except ConnectionResetError:  # it was closed before this end could use it
            return b""

    def status(self, data: bytes, *, port: int | None = None) -> int:
        said = self.raw(data, port=port)
        assert said.startswith(b"HTTP/1."), said
        return int(said.split(b" ", 2)[1])


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """Send bytes, and return everything that comes until the other end closes."""
    parts = []
    with suppress(OSError):  # the answer can come before all is sent
        connection.sendall(data)
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def request(path: str = "/echo", *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request after whose answer the connection is closed."""
    lines = [f"{method} {path} HTTP/1.1", "Host: served", "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def digests(*keys: str) -> frozenset[str]:
    return frozenset(sha256(key.encode()).hexdigest() for key in keys)


@contextmanager
def fronted(
    folder: Path,
    *,
    keys: tuple[str, ...] = (),
    change: Callable[[FrontPlan], FrontPlan] = lambda plan: plan,
    **limits: Any,
) -> Iterator[Fronted]:
    """A front before a `SmallApp`."""
    binary = haproxy_binary()
    assert binary is not None
    app = SmallApp()
    with listening(app) as port:
        plan = change(
            FrontPlan(
                host="127.0.0.1",
                port=free_port(),
                http=f"127.0.0.1:{port}",
                folder=folder,
                limits=FrontConfig(**limits),
                largest_body=LARGEST,
                needs_key=bool(keys),
                token=secrets.token_hex(8),
            )
        )
        process = HaproxyProcess(plan, binary)
        process.start(digests(*keys))
        try:
            yield Fronted(app, plan, process)
        finally:
            process.kill()
            app.go.release(1000)  # threads that wait would hold up the end of the application


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
