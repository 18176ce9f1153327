"""The memory of request bodies: its estimate against what parsing takes, its budget, and refusals by it."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.api.body_limit import MAX_DEPTH, BodyBounds, BodyLimit
from jobs.api.parsing_memory.body_cost import body_cost
from jobs.api.parsing_memory.body_memory import BodyMemory
from jobs.api.request_bodies import ChatRequest, CompletionRequest
from support.api_server import Served

JSON = {"Content-Type": "application/json"}
MIB = 1 << 20


def filled(begin: str, item: str, end: str, *, size: int = MIB) -> bytes:
    return (begin + ",".join([item] * (size // (len(item) + 1))) + end).encode()


SHAPES = {
    "empty lists": filled('{"prompt": [', "[]", "]}"),
    "empty objects": filled('{"messages": [', "{}", "]}"),
    "small numbers": filled('{"prompt": [', "1", "]}"),
    "token ids": filled('{"prompt": [', "123456", "]}"),
    "lists of ids": filled('{"prompt": [', "[1]", "]}"),
    "floats": filled('{"prompt": [', "0.5", "]}"),
    "texts": filled('{"prompt": [', '"a"', "]}"),
    "empty texts": filled('{"prompt": [', '""', "]}"),
    "messages": filled('{"messages": [', '{"role":"user","content":""}', "]}"),
    "parts": filled('{"messages": [{"role":"user","content":[', '{"type":"text","text":""}', "]}]}"),
    "keys": b"{" + b",".join(b'"k%d":1' % number for number in range(80_000)) + b"}",
    "wrong biases": b'{"logit_bias":{' + b",".join(b'"k%d":1' % number for number in range(80_000)) + b"}}",
    "prose": json.dumps({"prompt": "A list, of words: [so] {it} is. " * 30_000}).encode(),
    "wide characters": json.dumps({"prompt": "a" * 500_000 + "\U0001f600"}).encode(),
    "raw wide characters": json.dumps({"prompt": "\U0001f600" * 250_000}, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parsing_takes_no_more_than_the_estimate(shape: str) -> None:
    body = SHAPES[shape]
    cost = body_cost(body)
    tracemalloc.start()
    try:
        values = json.loads(body)
        kept = []
        with suppress(ValidationError):
            kept.append((ChatRequest if "messages" in values else CompletionRequest).model_validate(values))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + len(body) <= cost.memory, (peak, cost)


def counted(value: Any, depth: int = 0) -> tuple[int, int]:
    """Values and depth of plain values."""
    if not isinstance(value, dict | list):
        return 0, depth
    items = list(value.values()) if isinstance(value, dict) else value
    inner = [counted(item, depth + 1) for item in items]
    marks = 1 + max(0, len(items) - 1) + (len(items) if isinstance(value, dict) else 0)
    return marks + sum(one for one, _ in inner), max([depth + 1, *(deep for _, deep in inner)])


def drawn(source: random.Random, depth: int) -> Any:
    kind = source.randrange(7 if depth else 4)
    if kind < 3:
        return source.choice([1, -2.5, True, None, "", "a,b", '[{"\\', "\\", '\\"', "\u00e9\U0001f600,"])
    if kind == 3:
        return "".join(source.choice('ab"\\,:[]{}') for _ in range(source.randrange(40)))
    if kind < 6:
        return [drawn(source, depth - 1) for _ in range(source.randrange(12))]
    return {drawn(source, 0).__repr__(): drawn(source, depth - 1) for _ in range(source.randrange(8))}


def test_values_and_depth_are_counted_outside_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a string, or an escape, lies across the pieces in which a body is looked at."""
    monkeypatch.setattr("jobs.api.parsing_memory.body_cost._PIECE", 7)
    monkeypatch.setattr("jobs.api.parsing_memory.body_cost._FEW_VALUES", -1)
    source = random.Random(16)
    for _ in range(300):
        value = [drawn(source, 4)]
        cost = body_cost(json.dumps(value, ensure_ascii=source.random() < 0.5).encode())
        assert (cost.values, cost.depth) == counted(value)


def test_bytes_that_are_no_json_have_a_cost() -> None:
    source = random.Random(5)
    for _ in range(200):
        assert body_cost(source.randbytes(source.randrange(2000))).memory >= 0
    assert body_cost(b"").memory == 0
    assert body_cost(b"[" * MIB).depth == MIB


def test_memory_is_given_out_in_turn_and_within_its_size() -> None:
    async def run() -> list[str]:
        memory, order = BodyMemory(100, patience=10), []

        async def one(name: str, count: int, hold: asyncio.Event) -> None:
            await memory.take(count)
            order.append(name)
            assert memory.free >= 0
            await hold.wait()
            memory.give_back(count)

        first, rest = asyncio.Event(), asyncio.Event()
        rest.set()
        tasks = [asyncio.create_task(one("a", 60, first)), asyncio.create_task(one("b", 60, rest))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("c", 10, rest)))  # would fit, and waits its turn
        await asyncio.sleep(0)
        assert order == ["a"]
        first.set()
        await asyncio.gather(*tasks)
        assert memory.free == 100
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_who_waits_too_long_or_leaves_takes_nothing() -> None:
    async def run() -> None:
        memory = BodyMemory(100, patience=0.05)
        await memory.take(90)
        with pytest.raises(TimeoutError):
            await memory.take(20)
        leaving = asyncio.create_task(memory.take(20))
        behind = asyncio.create_task(memory.take(10))
        await asyncio.sleep(0)
        leaving.cancel()
        await behind  # it was behind the one that left
        memory.give_back(100)
        assert memory.free == 100

    asyncio.run(run())


@pytest.fixture
def small(served: Served) -> Iterator[Served]:
    """An interface with little memory for bodies."""
    backend = served.backend
    before, backend.bodies = backend.bodies, BodyMemory(4 * MIB, patience=0.1)
    longest, backend.longest = backend.longest, 1 << 20
    yield served
    assert backend.bodies.free == 4 * MIB
    backend.bodies, backend.longest = before, longest


def test_a_body_that_costs_more_than_there_is_gets_413_with_its_values(small: Served) -> None:
    answer = small.client.post("/v1/completions", content=filled('{"prompt": [', "[]", "]}"), headers=JSON)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["code"] == "body_too_large"
    assert "MiB" in error["message"]
    assert small.complete().status_code == 200


def test_a_body_with_more_values_than_a_request_can_have_gets_413(served: Served) -> None:
    most = 1024 * served.backend.longest + 10_000
    for count, status in ((most - 10, 400), (most + 10, 413)):
        body = '{"prompt": [' + ",".join(["1"] * count) + "]}"
        answer = served.client.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == status
        assert (answer.json()["error"]["code"] == "body_too_large") == (status == 413)


def test_a_body_for_which_there_is_no_memory_now_gets_503(small: Served) -> None:
    small.backend.bodies._taken += 4 * MIB
    try:
        answer = small.complete()
    finally:
        small.backend.bodies._taken -= 4 * MIB
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["Retry-After"]) >= 1


def arrival(header: tuple[bytes, bytes], sent: bytes, bounds: BodyBounds) -> tuple[Any, list[Any], list[Any]]:
    """A request whose body arrives as far as `sent`, with the messages that are asked for and answered."""
    asked: list[Any] = []
    answered: list[Any] = []

    async def receive() -> Any:
        asked.append("asked")
        if len(asked) == 1:
            return {"type": "http.request", "body": sent, "more_body": True}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        answered.append(message)

    limit = BodyLimit(lambda *_: asyncio.sleep(0), bounds=lambda: bounds)
    scope = {"type": "http", "headers": [header], "method": "POST"}
    return limit(scope, receive, send), asked, answered


def test_large_bodies_have_their_part_of_the_memory_before_they_are_read() -> None:
    async def run() -> None:
        bounds = BodyBounds(arriving=BodyMemory(17 * MIB), memory=BodyMemory(64 * MIB), rate=1e9, values=1000)
        large, small = (b"content-length", b"9000000"), (b"content-length", b"60000")
        call, asked, _ = arrival(large, b"a", bounds)
        first = asyncio.create_task(call)
        while len(asked) < 2:
            await asyncio.sleep(0)
        assert bounds.arriving.free == 17 * MIB - 9_000_000
        call, asked, answered = arrival(large, b"a", bounds)
        await call
        assert (answered[0]["status"], asked) == (503, [])
        call, asked, answered = arrival((b"transfer-encoding", b"chunked"), b"a" * 70_000, bounds)
        await call  # its size is unknown, so that its part is that of the largest body
        assert (answered[0]["status"], asked) == (503, ["asked"])
        call, asked, _ = arrival(small, b"a", bounds)
        second = asyncio.create_task(call)
        while len(asked) < 2:
            await asyncio.sleep(0)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert bounds.arriving.free == 17 * MIB

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_body_that_has_arrived_gives_its_part_back(served: Served) -> None:
    backend = served.backend
    before, backend.arriving = backend.arriving, BodyMemory(MIB)
    try:
        for size, status in ((500_000, 400), (500_000, 400), (2 * MIB, 503), (500_000, 400)):
            body = json.dumps({"prompt": "a", "unknown": "a" * size})
            answer = served.client.post("/v1/completions", content=body, headers=JSON)
            assert answer.status_code == status
        assert backend.arriving.free == MIB
    finally:
        backend.arriving = before


def test_a_body_that_is_nested_too_deeply_gets_400(served: Served) -> None:
    for depth, status in ((MAX_DEPTH - 10, 400), (MAX_DEPTH + 1, 400), (10_000, 400)):
        deep = '{"prompt": "a", "user": ' + "[" * depth + "]" * depth + "}"
        answer = served.client.post("/v1/completions", content=deep, headers=JSON)
        assert answer.status_code == status
        assert (answer.json()["error"]["code"] == "invalid_json") == (depth > MAX_DEPTH)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_a_body_in_another_encoding_than_utf8_gets_400(served: Served, encoding: str) -> None:
    """In UTF-16, half of another character passes for a quote, behind which the estimate sees nothing."""
    hidden = '{"prompt": "a", "user": "\u0122", "metadata": {"x": ' + "[" * 500 + "]" * 500 + "}}"
    assert body_cost(hidden.encode()).depth > 500 > body_cost(hidden.encode("utf-16-le")).depth
    for text in (hidden, '{"prompt": "a", "max_tokens": 1}'):
        answer = served.client.post("/v1/completions", content=text.encode(encoding), headers=JSON)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_json", None)
        assert "send JSON in UTF-8" in error["message"]


def test_utf8_may_begin_with_a_byte_order_mark(served: Served) -> None:
    body = b"\xef\xbb\xbf" + '{"prompt": "\u00e9", "max_tokens": 1}'.encode()
    assert served.client.post("/v1/completions", content=body, headers=JSON).status_code == 200


def test_a_body_that_comes_too_slowly_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.api.body_limit._GRACE_SECONDS", 0.05)
    sent: list[Any] = []
    bounds = BodyBounds(arriving=BodyMemory(MIB), memory=BodyMemory(MIB), rate=1000.0, values=100)
    limit = BodyLimit(lambda *_: asyncio.sleep(0), bounds=lambda: bounds)

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"content-length", b"1000")], "method": "POST"}
    asyncio.run(asyncio.wait_for(limit(scope, receive, send), 20))
    assert sent[0]["status"] == 408
