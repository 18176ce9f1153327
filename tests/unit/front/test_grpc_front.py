"""A real HAProxy before the interface's gRPC server: keys, streams, sizes, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from jobs.api.body_limit import MAX_BYTES
from jobs.serving.interface import grpc_methods
from protos.generation_pb2 import GenerateRequest
from protos.generation_pb2_grpc import GenerationStub
from support.fronted_app import free_port, fronted
from support.listening_grpc import TEXT, FakeBackend, Listening
from support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)
KEY = "correct-horse-battery"
BEARER = (("authorization", f"bearer  {KEY}"),)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """It has no keys itself: what is refused here is refused by the front."""
    monkeypatch.setattr(grpc_methods, "generate", FakeBackend.replies)
    return FakeBackend()


@pytest.fixture
def channel(backend: FakeBackend, tmp_path: Path) -> Iterator[grpc.Channel]:
    listening, port = Listening(backend), free_port()
    try:
        with (
            fronted(
                tmp_path, keys=(KEY,), change=lambda p: replace(p, grpc_port=port, grpc=listening.target)
            ),
            grpc.insecure_channel(
                f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]
            ) as channel,
        ):
            yield channel
    finally:
        listening.close()


def generated(channel: grpc.Channel, metadata: Any = BEARER, text: str = "x") -> str:
    request = GenerateRequest(text=text, max_tokens=3)
    return "".join(r.text for r in GenerationStub(channel).Generate(request, metadata=metadata, timeout=60))


def test_a_call_passes_with_the_key_alone(backend: FakeBackend, channel: grpc.Channel) -> None:
    assert generated(channel) == TEXT
    backend.largest = 0
    wrong: list[Any] = [(), (("authorization", f"Basic {KEY}"),), (*BEARER, *BEARER)]
    for metadata in (*wrong, (("authorization", f"Bearer {KEY}x"),)):
        with pytest.raises(grpc.RpcError) as caught:
            generated(channel, metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "API key" in str(caught.value.details())
    assert backend.largest == 0
    assert generated(channel) == TEXT


def test_the_key_comes_before_the_message(channel: grpc.Channel) -> None:
    held = threading.Event()

    def nothing() -> Iterator[bytes]:
        held.wait(60)
        return
        yield b""

    call = channel.stream_stream("/raymoe.v1.Generation/Generate", None, None)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            list(call(nothing(), timeout=30))
    finally:
        held.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_message_of_any_allowed_size_passes(backend: FakeBackend, channel: grpc.Channel) -> None:
    assert generated(channel, text="x" * (MAX_BYTES - 64)) == TEXT
    assert backend.largest == MAX_BYTES - 64
    with pytest.raises(grpc.RpcError) as caught:
        generated(channel, text="x" * MAX_BYTES)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_stream_comes_reply_by_reply_and_its_end_is_passed_on(
    backend: FakeBackend, channel: grpc.Channel
) -> None:
    call = GenerationStub(channel).Generate(GenerateRequest(text="x"), metadata=BEARER, timeout=60)
    assert next(iter(call)).text == "0 "  # of replies without end
    call.cancel()
    wait_until(lambda: not backend.running)


def test_health_needs_no_key_and_no_large_message(channel: grpc.Channel) -> None:
    health = HealthStub(channel)
    for name in ("", "raymoe.v1.Generation"):
        assert (
            health.Check(HealthCheckRequest(service=name), timeout=60).status == HealthCheckResponse.SERVING
        )
    for size in (2000, 100_000, MAX_BYTES - 64):
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(HealthCheckRequest(service="x" * size), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    watched = health.Watch(HealthCheckRequest(), timeout=60)
    assert next(iter(watched)).status == HealthCheckResponse.SERVING
    watched.cancel()
