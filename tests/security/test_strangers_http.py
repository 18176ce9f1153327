"""What a stranger can send to the HTTP port: memory stays bounded, and ordinary requests are answered.

The figures are printed with `pytest -m soak -s tests/security`.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from support.commands.serve import ServeProcess, running, save_model, tiny_model
from support.malformed_http import malformed_request

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
Attack = Callable[[ServeProcess], None]
KEY = "a-key-that-no-stranger-has"
MIB = 1 << 20
LARGEST = 16 * MIB
ANSWER_SECONDS = 1.0
GROWTH = {
    "haproxy": 96 * MIB,  # buffers of all connections
    "ProxyActor": 320 * MIB,  # bodies that are being read: `serving.front.body_memory`, and their transport
    "ServeReplica:raymoe:api": 640 * MIB,  # the same bodies, and as much for parsing them
    "ServeReplica:raymoe:trunk": 32 * MIB,
    "ServeReplica:raymoe:experts": 32 * MIB,
    "_ExpertHostProcess": 32 * MIB,
    "_CoordinatorProcess": 32 * MIB,
}
"""What each kind of process may take more, at any moment of any attack, than before the first one."""


def members(server: ServeProcess) -> dict[int, tuple[str, psutil.Process]]:
    found = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join([child.name(), *child.cmdline()])
            for kind in GROWTH:
                if kind in title:
                    found[child.pid] = (kind, child)
    return found


@dataclass
class Watch:
    """Measures memory of all processes, and asks an ordinary request again and again."""

    server: ServeProcess
    before: dict[int, int] = field(default_factory=dict)
    most: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._members = members(self.server)
        assert {kind for kind, _ in self._members.values()} == set(GROWTH)
        self.kinds = {pid: kind for pid, (kind, _) in self._members.items()}
        self.before = {pid: process.memory_info().rss for pid, (_, process) in self._members.items()}
        self.most = dict(self.before)

    def measure(self) -> None:
        while not self._over.is_set():
            for pid, (_, process) in self._members.items():
                self.most[pid] = max(self.most[pid], process.memory_info().rss)
            time.sleep(0.02)

    def ask(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                ordinary(self.server)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self.latencies.append(time.monotonic() - began)
            time.sleep(0.05)

    def during(self, attack: Callable[[], object]) -> dict[str, int]:
        """Growth in bytes of each kind of process during an attack."""
        self.latencies.clear()
        self._over.clear()
        self.most = dict(self.before)
        threads = [threading.Thread(target=one) for one in (self.measure, self.ask)]
        for thread in threads:
            thread.start()
        try:
            attack()
        finally:
            self._over.set()
            for thread in threads:
                thread.join(60)
        grown: dict[str, int] = {}
        for pid, most in self.most.items():
            kind = self.kinds[pid]
            grown[kind] = max(grown.get(kind, 0), most - self.before[pid])
        return grown


def ordinary(server: ServeProcess) -> None:
    body = json.dumps({"prompt": "the cat", "max_tokens": 2}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"{server.url}/v1/completions", data=body, headers=headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("strangers")
    keys = folder / "config.yaml"
    keys.write_text(f"serving:\n  api_keys: [{KEY}]\n")
    model = tiny_model()
    directory = save_model(model, folder / "tiny")
    with running(model, directory, folder / "serve.log", "--config", str(keys)) as made:
        for _ in range(20):
            ordinary(made)
        yield made


@pytest.fixture(scope="module")
def watch(server: ServeProcess) -> Watch:
    return Watch(server)


def address(server: ServeProcess) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def connect(server: ServeProcess) -> socket.socket:
    return socket.create_connection(address(server), timeout=60)


def told(server: ServeProcess, *parts: bytes) -> bytes:
    """What the server answers until it closes the connection."""
    said = b""
    with closing(connect(server)) as connection, suppress(OSError):
        with suppress(OSError):
            for part in parts:
                connection.sendall(part)
        while more := connection.recv(1 << 16):
            said += more
            if len(said) > MIB:
                break
    return said


def post(body: bytes, *, key: str | None, path: str = "/v1/completions") -> tuple[bytes, bytes]:
    lines = [f"POST {path} HTTP/1.1", "Host: served", "Connection: close", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, "", ""]).encode(), body


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/1.1 ") else 0


def header_of_32_mib() -> Attack:
    line = b"X-Large: " + b"x" * (MIB - 11) + b"\r\n"
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(100_000))

    def attack(server: ServeProcess) -> None:
        first = b"GET /v1/models HTTP/1.1\r\nHost: served\r\n"
        for _ in range(20):
            said = told(server, first, *([line] * 32), b"\r\n")
            assert status(said) in (0, 400)  # 0: reset while it was still being sent
            assert status(told(server, first, many, b"\r\n")) in (0, 400)

    return attack


def half_sent_requests() -> Attack:
    return _half_sent_requests


def slow_bodies() -> Attack:
    return _slow_bodies


def malformed_requests() -> Attack:
    return _malformed_requests


def _half_sent_requests(server: ServeProcess) -> None:
    """900 headers that never end are closed within the time for a header."""
    with ExitStack() as stack:
        held = [stack.enter_context(closing(connect(server))) for _ in range(900)]
        for connection in held:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: served\r\n")
        began = time.monotonic()
        for connection in held:
            with suppress(ConnectionResetError):
                while connection.recv(1 << 16):
                    pass
        assert time.monotonic() - began < 20


def _slow_bodies(server: ServeProcess) -> None:
    """Bodies of a byte now and then, from somebody who has a key; all are closed."""
    head, _ = post(b"x" * 1000, key=KEY)
    with ExitStack() as stack:
        held = [stack.enter_context(closing(connect(server))) for _ in range(200)]
        for connection in held:
            connection.sendall(head)
        open_, began = set(range(len(held))), time.monotonic()
        while open_:
            assert time.monotonic() - began < 60, f"{len(open_)} slow bodies are still being read"
            for number in list(open_):
                try:
                    held[number].settimeout(0.001)
                    held[number].sendall(b"x")
                    if not held[number].recv(1 << 16):
                        open_.discard(number)
                except TimeoutError:
                    continue
                except OSError:
                    open_.discard(number)
            time.sleep(0.5)


def at_once(
    server: ServeProcess, body: bytes, *, key: str | None, path: str = "/v1/completions"
) -> list[int]:
    with ThreadPoolExecutor(4) as pool:
        return [
            status(said)
            for said in pool.map(lambda _: told(server, *post(body, key=key, path=path)), range(4))
        ]


def filled(begin: str, item: str, end: str, size: int = LARGEST) -> bytes:
    return (begin + ",".join([item] * ((size - len(begin) - len(end)) // (len(item) + 1))) + end).encode()


def bodies_without_a_key() -> Attack:
    body = filled('{"prompt": [', "[]", "]}")

    def attack(server: ServeProcess) -> None:
        refused(at_once(server, body, key=None), {0, 401}, "without a key")
        refused(at_once(server, body, key=None, path="/health"), {0, 413}, "a path without a key")

    return attack


def refused(found: list[int], allowed: set[int], what: str) -> None:
    assert set(found) <= allowed, what


def bodies_with_a_key() -> Attack:
    """Wide JSON of 16 MiB, four at a time."""
    completions = {
        "lists": filled('{"prompt": [', "[]", "]}"),
        "numbers": filled('{"prompt": [', "1", "]}"),
        "ids": filled('{"prompt": [', "12345", "]}"),
        "keys": b"{" + b",".join(b'"k%d":1' % number for number in range(1_200_000)) + b"}",
        "text": filled('{"prompt": "', "words ", '"}'),
        "wide text": ('{"prompt": "' + "\U0001f600" * (LARGEST // 4 - 10) + '"}').encode(),
    }
    messages = filled('{"messages": [', "{}", "]}")

    def attack(server: ServeProcess) -> None:
        for name, body in completions.items():
            assert len(body) <= LARGEST
            refused(at_once(server, body, key=KEY), {400, 413, 503}, name)
        refused(at_once(server, messages, key=KEY, path="/v1/chat/completions"), {400, 413, 503}, "messages")

    return attack


def deep_bodies() -> Attack:
    depths = (1000, 100_000, LARGEST // 2 - 20)
    bodies = [b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}" for depth in depths]

    def attack(server: ServeProcess) -> None:
        for body in bodies:
            refused(at_once(server, body, key=KEY), {400, 413, 503}, "deep")

    return attack


def _malformed_requests(server: ServeProcess) -> None:
    source = random.Random(16)
    for _ in range(1000):
        data = malformed_request(source)
        with closing(connect(server)) as connection, suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            said = b""
            while part := connection.recv(1 << 16):
                said += part
            assert b"smuggled" not in said
            assert said == b"" or said.startswith((b"HTTP/1.1 ", b"HTTP/1.0 "))


ATTACKS = [
    header_of_32_mib,
    half_sent_requests,
    slow_bodies,
    bodies_without_a_key,
    bodies_with_a_key,
    deep_bodies,
    malformed_requests,
]


@pytest.mark.parametrize("prepare", ATTACKS, ids=lambda prepare: prepare.__name__)
def test_memory_is_bounded_and_ordinary_requests_are_answered(
    server: ServeProcess, watch: Watch, prepare: Callable[[], Attack]
) -> None:
    watch.failures.clear()
    attack = prepare()
    grown = watch.during(lambda: attack(server))
    latencies = sorted(watch.latencies)
    figures = ", ".join(f"{kind.rpartition(':')[2]} +{grown[kind] / MIB:.0f}" for kind in GROWTH)
    print(
        f"\n{prepare.__name__}: {len(latencies)} ordinary requests, median "
        f"{statistics.median(latencies):.3f} s, longest {latencies[-1]:.3f} s; MiB: {figures}"
    )
    assert watch.failures == []
    assert latencies[-1] <= ANSWER_SECONDS
    assert {kind: grown[kind] for kind in GROWTH if grown[kind] > GROWTH[kind]} == {}


def test_nothing_has_ended_meanwhile(server: ServeProcess, watch: Watch) -> None:
    assert set(watch.before) <= set(members(server))  # a standby of the coordinator may have come
    log = Path(server.log).read_text()
    assert "Traceback" not in log
