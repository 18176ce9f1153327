"""The interface's gRPC server over a socket: keys before messages, and bounds on what strangers send."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from jobs.api import grpc_guard
from jobs.api.api_errors import ApiError
from jobs.api.api_keys import POLL_SECONDS, ApiKeys
from jobs.api.body_limit import MAX_BYTES
from jobs.serving.interface import grpc_methods
from protos.generation_pb2 import GenerateReply, GenerateRequest
from protos.generation_pb2_grpc import GenerationStub
from support.listening_grpc import TEXT, FakeBackend, Listening
from support.waiting import wait_until

KEY = "a-key-of-the-grpc-tests"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GENERATE, CHECK = "/raymoe.v1.Generation/Generate", "/grpc.health.v1.Health/Check"
LARGE = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
BEARER = (("authorization", f"Bearer {KEY}"),)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    monkeypatch.setattr(grpc_methods, "generate", FakeBackend.replies)
    return FakeBackend(KEY)


@pytest.fixture
def listening(backend: FakeBackend) -> Iterator[Listening]:
    found = Listening(backend)
    yield found
    found.close()


@pytest.fixture
def channel(listening: Listening) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(listening.target, options=LARGE) as channel:
        yield channel


def generated(channel: grpc.Channel, metadata: Any = BEARER) -> str:
    request = GenerateRequest(text="x", max_tokens=3)
    call = GenerationStub(channel).Generate(request, metadata=metadata, timeout=60)
    return "".join(reply.text for reply in call)


def refusal(channel: grpc.Channel, method: str, *messages: bytes, **options: Any) -> tuple[Any, str]:
    call = channel.stream_stream(method, None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter(messages), timeout=60, **options))
    return caught.value.code(), str(caught.value.details())


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", KEY),),
        (("authorization", f"Bearer {KEY}x"),),
        (("authorization", f"Basic {KEY}"),),
        (("authorization", f"Bearer {KEY}"), ("authorization", "Bearer of-another-key-too")),
    ],
)
def test_without_the_key_a_call_is_refused(channel: grpc.Channel, metadata: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        generated(channel, metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert generated(channel, (("authorization", f"BEARER  {KEY}"),)) == TEXT


@pytest.mark.parametrize("method", [GENERATE, REFLECT])
def test_the_key_comes_before_the_message(channel: grpc.Channel, method: str) -> None:
    """No message is sent at all, and the answer is there: nothing was waited for."""
    call = channel.stream_stream(method, None, None)
    held = threading.Event()

    def nothing() -> Iterator[bytes]:
        held.wait(60)
        return
        yield b""

    try:
        with pytest.raises(grpc.RpcError) as caught:
            list(call(nothing(), timeout=30))
    finally:
        held.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_message_over_the_limit_of_http_is_refused(channel: grpc.Channel) -> None:
    code, details = refusal(channel, GENERATE, bytes(MAX_BYTES + 1), metadata=BEARER)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and str(MAX_BYTES) in details


@pytest.mark.parametrize("method", [GENERATE, CHECK])
def test_a_compressed_message_is_refused_and_not_inflated(channel: grpc.Channel, method: str) -> None:
    bomb = bytes(1 << 30)
    for message in (b"", bomb):
        code, _ = refusal(channel, method, message, metadata=BEARER, compression=grpc.Compression.Gzip)
        assert code is grpc.StatusCode.UNIMPLEMENTED


def test_large_metadata_are_refused(channel: grpc.Channel) -> None:
    code, _ = refusal(channel, GENERATE, b"", metadata=(*BEARER, ("x", "x" * (64 << 10))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert generated(channel) == TEXT


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x12\x05ab"])
def test_a_message_that_cannot_be_parsed_ends_its_call(channel: grpc.Channel, data: bytes) -> None:
    code, details = refusal(channel, GENERATE, data, metadata=BEARER)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "parsed" in details
    code, details = refusal(channel, GENERATE, metadata=BEARER)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "no message" in details


def test_health_needs_no_key_and_reflection_does(channel: grpc.Channel) -> None:
    health = HealthStub(channel)
    assert health.Check(HealthCheckRequest(), timeout=60).status == HealthCheckResponse.SERVING
    for service in ("other", "x" * (1 << 20)):
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(HealthCheckRequest(service=service), timeout=60)
        assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


class KeySender(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]  # the library has no types
    """Sends the API key with the calls of server reflection, whose client has no option for it."""

    def intercept_stream_stream(self, continuation: Any, details: Any, messages: Any) -> Any:
        return continuation(details._replace(metadata=BEARER), messages)


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, KeySender()))
    assert {"raymoe.v1.Generation", "grpc.health.v1.Health"} <= set(database.get_services())
    service = DescriptorPool(database).FindServiceByName("raymoe.v1.Generation")
    assert service.FindMethodByName("Generate").server_streaming


def test_watchers_of_the_health_are_bounded_and_leave_room_for_others(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_guard, "OPEN_CALLS", 5)
    health = HealthStub(channel)
    watching = [health.Watch(HealthCheckRequest(), timeout=60) for _ in range(5)]
    for one in watching:
        assert next(one).status == HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(health.Watch(HealthCheckRequest(), timeout=60))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert generated(channel) == TEXT
    for one in watching:
        one.cancel()
    deadline = time.monotonic() + 60
    while True:  # until the server has noticed
        with suppress(grpc.RpcError):
            next(health.Watch(HealthCheckRequest(), timeout=60))
            break
        assert time.monotonic() < deadline


def test_messages_that_never_come_leave_the_places_to_others(
    listening: Listening, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    def nothing() -> Iterator[bytes]:
        held.wait(60)
        return
        yield b""

    monkeypatch.setattr(grpc_guard, "READ_SECONDS", 0.5)
    call = channel.stream_stream(GENERATE, None, None)
    try:
        waiting = [call(nothing(), metadata=BEARER, timeout=60) for _ in range(2 * grpc_guard.READING)]
        for one in waiting:
            with pytest.raises(grpc.RpcError) as caught:
                list(one)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "0.5 s" in str(caught.value.details())
        assert generated(channel) == TEXT
    finally:
        held.set()


def test_a_cancelled_call_ends_the_generation(backend: FakeBackend, channel: grpc.Channel) -> None:
    for _ in range(5):
        call = GenerationStub(channel).Generate(GenerateRequest(text="x"), metadata=BEARER, timeout=60)
        next(iter(call))
        call.cancel()
    wait_until(lambda: not backend.running)


def test_nothing_of_a_refused_call_is_kept(
    backend: FakeBackend, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library keeps the exceptions of its own `abort`, and what their tracebacks refer to."""

    class Marker:
        pass

    seen: list[weakref.ref[Marker]] = []

    async def refused(_: Any, message: GenerateRequest) -> AsyncGenerator[GenerateReply, None]:
        marker = Marker()
        seen.append(weakref.ref(marker))
        raise ApiError(404, "there is no such model")
        yield GenerateReply()

    monkeypatch.setattr(grpc_methods, "generate", refused)
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as caught:
            generated(channel)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    wait_until(lambda: gc.collect() >= 0 and all(marker() is None for marker in seen))
    assert len(seen) == 3


def test_servers_share_a_port(backend: FakeBackend) -> None:
    """As the processes of the interface do; the port is there until the last of them ends."""
    first = Listening(backend)
    second = Listening(backend, first.target)
    try:
        assert second.target == first.target
        first.close()
        with grpc.insecure_channel(second.target) as channel:
            assert generated(channel) == TEXT
    finally:
        second.close()


def test_keys_change_without_a_restart(backend: FakeBackend, tmp_path: Path) -> None:
    file, later = tmp_path / "keys", "another-key-of-the-grpc-tests"
    file.write_text(KEY)
    hands = [0.0]
    backend.keys = ApiKeys((), file, tell=lambda line: None, clock=lambda: hands[0])
    listening = Listening(backend)
    try:
        with grpc.insecure_channel(listening.target) as channel:
            assert generated(channel) == TEXT
            file.write_text(later)
            hands[0] += POLL_SECONDS
            with pytest.raises(grpc.RpcError):
                generated(channel)
            assert generated(channel, (("authorization", f"Bearer {later}"),)) == TEXT
    finally:
        listening.close()
