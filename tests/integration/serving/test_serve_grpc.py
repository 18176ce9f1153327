"""gRPC of `raymoe serve`, with generated stubs and with server reflection."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos.generation_pb2 import GenerateReply, GenerateRequest, TokenIds
from protos.generation_pb2_grpc import GenerationStub
from support.commands.serve import KEY, ONE_REPLICA, PROMPT, ServeProcess, SharedServer

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("one replica")]
SERVICE = "raymoe.v1.Generation"


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(ONE_REPLICA, grpc=True)


@pytest.fixture
def channel(server: ServeProcess) -> Iterator[grpc.Channel]:
    assert server.grpc is not None
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


def call(channel: grpc.Channel, *, key: str = KEY, **fields: Any) -> Any:
    fields = {"text": PROMPT, "temperature": 0.0, **fields}
    metadata = (("authorization", f"Bearer {key}"),)
    return GenerationStub(channel).Generate(GenerateRequest(**fields), metadata=metadata, timeout=60)


def text(replies: list[GenerateReply]) -> str:
    return "".join(reply.text for reply in replies)


def test_the_same_tokens_as_the_model_and_as_over_http(server: ServeProcess, channel: grpc.Channel) -> None:
    replies = list(call(channel, max_tokens=24, ignore_eos=True, model="tiny"))
    assert [token for reply in replies for token in reply.token_ids] == server.greedy(24)
    assert len(replies) > 1  # streamed
    assert replies[-1].finish_reason == "length"
    assert replies[-1].usage.completion_tokens == 24
    whole = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    assert text(replies) == whole.choices[0].text
    assert {reply.system_fingerprint for reply in replies} == {whole.system_fingerprint}


def test_sampling_with_a_seed_and_prompts_of_tokens(server: ServeProcess, channel: grpc.Channel) -> None:
    ids = [40, 41, 42]
    whole = server.client.completions.create(
        model="tiny", prompt=ids, max_tokens=9, temperature=0.9, seed=7, n=2
    )
    fields = {"text": None, "tokens": TokenIds(ids=ids), "max_tokens": 9, "temperature": 0.9, "seed": 7}
    replies = list(call(channel, n=2, **fields))
    for choice in whole.choices:
        assert text([reply for reply in replies if reply.index == choice.index]) == choice.text


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"temperature": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"text": None}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"max_tokens": 100_000}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND, "'tiny'"),
        ({"key": "wrong"}, grpc.StatusCode.UNAUTHENTICATED, "API key"),
    ],
)
def test_refusals_are_statuses(
    channel: grpc.Channel, fields: dict[str, Any], code: grpc.StatusCode, said: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(call(channel, **fields))
    assert caught.value.code() is code
    assert said in caught.value.details()


def test_other_machines_do_not_reach_the_port(server: ServeProcess) -> None:
    assert server.grpc is not None
    port = server.grpc.rpartition(":")[2]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.254", 9))  # sends nothing; says which address a packet would leave from
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no other address than the loopback")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, int(port)), timeout=60)


def test_a_port_that_is_taken_is_refused_before_anything_starts(server: ServeProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "jobs.cli", "serve", str(server.directory)),
                *("--grpc-port", str(port)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"--grpc-port {port} is not available" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_cancelled_call_frees_its_pages(server: ServeProcess, channel: grpc.Channel) -> None:
    calls = [call(channel, max_tokens=400, ignore_eos=True, temperature=1.0) for _ in range(20)]
    for one in calls:
        next(iter(one))
        one.cancel()
    deadline = time.monotonic() + 60
    while any(server.gauges().values()):
        assert time.monotonic() < deadline, server.gauges()
    assert len(list(call(channel, max_tokens=3))) > 0


class WithKey(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]  # the library has no types
    """Sends the API key with the calls of server reflection, whose client has no option for it."""

    def intercept_stream_stream(self, continuation: Any, details: Any, messages: Any) -> Any:
        return continuation(details._replace(metadata=(("authorization", f"Bearer {KEY}"),)), messages)


def test_reflection_lists_and_describes_the_service(channel: grpc.Channel) -> None:
    """Like grpcurl, the client knows the service from server reflection alone."""
    with pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithKey()))
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    pool = DescriptorPool(database)
    method = pool.FindServiceByName(SERVICE).FindMethodByName("Generate")
    assert method.server_streaming and not method.client_streaming
    assert {"temperature", "max_tokens", "stop"} <= set(method.input_type.fields_by_name)
    assert method.output_type.full_name == "raymoe.v1.GenerateReply"


def test_health_is_told_and_a_killed_host_is_not_missed(server: ServeProcess, channel: grpc.Channel) -> None:
    health = HealthStub(channel)
    for name in ("", SERVICE):
        assert health.Check(HealthCheckRequest(service=name)).status == HealthCheckResponse.SERVING
    assert set(health.List(HealthListRequest()).statuses) == {"", SERVICE}
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    said = text(list(call(channel, max_tokens=20)))
    changes = health.Watch(HealthCheckRequest(), timeout=60)
    assert next(changes).status == HealthCheckResponse.SERVING
    changes.cancel()
    server.hosts()[0].kill()
    assert text(list(call(channel, max_tokens=20))) == said
    deadline = time.monotonic() + 60
    while health.Check(HealthCheckRequest()).status != HealthCheckResponse.SERVING:
        assert time.monotonic() < deadline
