"""What a stranger can send to the gRPC port: memory stays bounded, and ordinary requests are answered.

The figures are printed with `pytest -m soak -s tests/security`.
"""

from __future__ import annotations

import random
import socket
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from jobs.api.body_limit import MAX_BYTES
from protos.generation_pb2 import GenerateRequest
from protos.generation_pb2_grpc import GenerationStub
from support.commands.serve import KEY, ONE_REPLICA, ServeProcess, free_port, running, save_model, tiny_model
from support.malformed_http2 import GENERATE, call_headers, frame, malformed_connection, message

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
MIB = 1 << 20
FRAMES = 10_000
ANSWER_SECONDS = 1.0
CHECK = "/grpc.health.v1.Health/Check"
BEARER = (("authorization", f"Bearer {KEY}"),)
LARGE = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", MIB)]
GROWTH = {
    "haproxy": 96 * MIB,
    "ServeReplica:raymoe:api": 256 * MIB,
    "ServeReplica:raymoe:trunk": 32 * MIB,
    "ServeReplica:raymoe:experts": 32 * MIB,
    "ProxyActor": 32 * MIB,
    "_ExpertHostProcess": 32 * MIB,
    "_CoordinatorProcess": 32 * MIB,
}
"""What each kind of process may take more, at any moment of any attack, than before the first one."""


class MemoryWatch:
    """Measures the memory of a server's processes, and asks an ordinary request again and again."""

    def __init__(self, server: ServeProcess) -> None:
        assert server.grpc is not None
        self.channel = grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        self.processes = dict(self._found(server))
        for _ in range(20):
            self.ordinary()
        self.before = {one: one.memory_info().rss for one in self.processes}
        self.most = dict(self.before)
        self.latencies, self.failures = list[float](), list[str]()

    def _found(self, server: ServeProcess) -> Iterator[tuple[psutil.Process, str]]:
        for child in psutil.Process(server.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join([child.name(), *child.cmdline()])
                yield from ((child, kind) for kind in GROWTH if kind in title)

    def ordinary(self) -> None:
        request = GenerateRequest(text="the cat", max_tokens=2)
        replies = list(GenerationStub(self.channel).Generate(request, metadata=BEARER, timeout=30))
        assert replies[-1].usage.completion_tokens == 2

    def during(self, attack: Callable[[], object]) -> dict[str, int]:
        """Growth in bytes of each kind of process during an attack."""
        over = threading.Event()

        def measure() -> None:
            while not over.wait(0.02):
                for one in self.processes:
                    self.most[one] = max(self.most[one], one.memory_info().rss)

        def ask() -> None:
            while not over.wait(0.05):
                began = time.monotonic()
                try:
                    self.ordinary()
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.latencies.append(time.monotonic() - began)

        self.most, self.latencies, self.failures = dict(self.before), [], []
        threads = [threading.Thread(target=one) for one in (measure, ask)]
        for thread in threads:
            thread.start()
        try:
            attack()
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        grown: dict[str, int] = {}
        for one, kind in self.processes.items():
            grown[kind] = max(grown.get(kind, 0), self.most[one] - self.before[one])
        return grown


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("strangers")
    settings = [part for name, value in ONE_REPLICA.items() for part in ("--set", f"{name}={value}")]
    model, log = tiny_model(), folder / "serve.log"
    directory = save_model(model, folder / "tiny")
    with running(model, directory, log, *settings, "--grpc-port", str(free_port())) as made:
        yield made


@pytest.fixture(scope="module")
def watch(server: ServeProcess) -> Iterator[MemoryWatch]:
    found = MemoryWatch(server)
    with closing(found.channel):
        yield found


def target(server: ServeProcess) -> tuple[str, int]:
    assert server.grpc is not None
    host, _, port = server.grpc.rpartition(":")
    return host, int(port)


def malformed_frames(server: ServeProcess) -> None:
    source, sent = random.Random(16), 0
    while sent < FRAMES:
        data, frames = malformed_connection(source)
        sent += frames
        with closing(socket.create_connection(target(server), timeout=60)) as connection, suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                continue


def codes(server: ServeProcess, method: str, sent: bytes, count: int, **options: Any) -> set[Any]:
    """Statuses of this many calls at the same time."""
    assert server.grpc is not None
    found = set()
    with grpc.insecure_channel(server.grpc, options=LARGE) as channel:
        calls = channel.stream_stream(method, None, None)
        under_way = [calls(iter([sent]), timeout=120, **options) for _ in range(count)]
        for call in under_way:
            try:
                list(call)
                found.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                found.add(error.code())
    return found


def large_messages_without_a_key(server: ServeProcess) -> None:
    sent = GenerateRequest(text="x" * (MAX_BYTES - 64)).SerializeToString()
    allowed = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE}
    for _ in range(4):
        assert codes(server, GENERATE, sent, 16) <= allowed


def large_health_checks(server: ServeProcess) -> None:
    sent = HealthCheckRequest(service="x" * (MAX_BYTES - 64)).SerializeToString()
    for _ in range(4):
        found = codes(server, CHECK, sent, 16)
        assert grpc.StatusCode.OK not in found, found


def compressed_bombs(server: ServeProcess) -> None:
    """1 GiB of zeros in 1 MiB, with and without a key; raw, since a client would hold them inflated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(packer.compress(bytes(16 * MIB)) for _ in range(64)) + packer.flush()
    bomb = message(packed, compressed=1)
    for path, key in ((GENERATE, True), (GENERATE, False), (CHECK, False)):
        fields = [
            (b"grpc-encoding", b"gzip"),
            *([(b"authorization", f"Bearer {KEY}".encode())] if key else []),
        ]
        with closing(socket.create_connection(target(server), timeout=60)) as connection, suppress(OSError):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            connection.sendall(frame(1, 4, 1, call_headers(path, *fields)))
            connection.settimeout(2.0)
            for at in range(0, len(bomb), 1 << 14):  # without regard to the window of flow control
                connection.sendall(frame(0, 0, 1, bomb[at : at + (1 << 14)]))
            while connection.recv(1 << 16):
                continue
        found = codes(
            server, path, bytes(2 * MAX_BYTES), 4, metadata=BEARER, compression=grpc.Compression.Gzip
        )
        assert grpc.StatusCode.OK not in found, found


def huge_metadata(server: ServeProcess) -> None:
    for size in (20_000, MIB // 2):
        found = codes(server, GENERATE, b"", 64, metadata=(("x", "x" * size),))
        assert grpc.StatusCode.OK not in found, found


def calls_that_stay_open(server: ServeProcess) -> None:
    """Watchers of the health, calls without a message, and silent connections, 600 each."""
    assert server.grpc is not None
    with ExitStack() as stack:
        channels = [
            stack.enter_context(
                grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(4)
        ]
        held = threading.Event()
        stack.callback(held.set)

        def nothing() -> Iterator[bytes]:
            held.wait(60)
            return
            yield b""

        for number in range(600):
            channel = channels[number % len(channels)]
            HealthStub(channel).Watch(HealthCheckRequest(), timeout=20)
            if number % 10 == 0:  # each has a thread of its own in this client
                channel.stream_stream(CHECK, None, None)(nothing(), timeout=20)
        for _ in range(600):
            with suppress(OSError):
                stack.enter_context(closing(socket.create_connection(target(server), timeout=60)))
        began = time.monotonic()
        while time.monotonic() - began < 10:
            time.sleep(0.1)


ATTACKS = [
    malformed_frames,
    large_messages_without_a_key,
    large_health_checks,
    compressed_bombs,
    huge_metadata,
    calls_that_stay_open,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_memory_is_bounded_and_ordinary_requests_are_answered(
    server: ServeProcess, watch: MemoryWatch, attack: Callable[[ServeProcess], None]
) -> None:
    began = time.monotonic()
    grown = watch.during(lambda: attack(server))
    latencies = sorted(watch.latencies)
    figures = ", ".join(f"{kind.rpartition(':')[2]} +{size / MIB:.0f}" for kind, size in grown.items())
    print(
        f"\n{attack.__name__}: {time.monotonic() - began:.0f} s, {len(latencies)} ordinary requests, median "
        f"{statistics.median(latencies):.3f} s, longest {latencies[-1]:.3f} s; MiB: {figures}"
    )
    assert watch.failures == []
    assert latencies[-1] <= ANSWER_SECONDS
    assert {kind: size for kind, size in grown.items() if size > GROWTH[kind]} == {}


def test_nothing_has_ended_meanwhile(server: ServeProcess, watch: MemoryWatch) -> None:
    assert all(one.is_running() for one in watch.processes)
    assert "Traceback" not in Path(server.log).read_text()
