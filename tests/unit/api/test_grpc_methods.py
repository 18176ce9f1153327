"""The gRPC methods of a replica, called as Serve's proxy calls them, over an engine in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest

from errors import RaymoeError
from jobs.api.backend import Limits
from jobs.api.grpc_generation import completion_request
from jobs.api.request_bodies import CompletionRequest
from jobs.serving.interface.grpc_methods import GrpcMethods, on_this_machine
from protos.generation_pb2 import GenerateReply, GenerateRequest, TokenIds
from support.api_server import PROMPT, Served


class Context:
    """A fake of Serve's gRPC context with what the methods use."""

    def __init__(self, metadata: dict[str, str] | None = None, peer: str = "ipv4:127.0.0.1:5") -> None:
        self._metadata, self._peer = metadata or {}, peer
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return list(self._metadata.items())

    def peer(self) -> str:
        return self._peer

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


class Methods(GrpcMethods):
    def __init__(self, served: Served, *, loopback: bool = False) -> None:
        self._served, self._loopback = served, loopback

    @property
    def backend(self) -> Any:
        return self._served.backend

    def generate(self, context: Any = None, **fields: Any) -> list[GenerateReply]:
        fields = {"text": PROMPT, "temperature": 0, **fields}

        async def collect() -> list[GenerateReply]:
            request = GenerateRequest(**fields)
            return [reply async for reply in self.Generate(request, grpc_context=context or Context())]

        return asyncio.run(collect())

    def refused(self, context: Context | None = None, **fields: Any) -> tuple[grpc.StatusCode | None, str]:
        context = context or Context()
        with pytest.raises(RaymoeError):
            self.generate(context, **fields)
        return context.code, context.details


def test_replies_are_the_same_as_over_http(served: Served) -> None:
    fields = {"max_tokens": 9, "temperature": 0.8, "seed": 4, "n": 2, "logprobs": 2, "echo": True}
    whole = served.complete(**fields).json()
    replies = Methods(served).generate(**fields)
    for index, choice in enumerate(whole["choices"]):
        mine = [reply for reply in replies if reply.index == index]
        assert "".join(reply.text for reply in mine) == choice["text"]
        assert [reply.finish_reason for reply in mine if reply.finish_reason] == [choice["finish_reason"]]
        logprobs = [at for reply in mine for at in reply.logprobs]
        shown = choice["logprobs"]["token_logprobs"]
        assert not logprobs[0].HasField("token") and shown[0] is None
        assert [at.token for at in logprobs[1:]] == pytest.approx(shown[1:], abs=1e-4)
        assert len(logprobs[1].top_ids) == len(logprobs[1].top) == 2
        ids = [token for reply in mine for token in reply.token_ids]
        assert ids[: len(served.tokenizer.encode(PROMPT).ids)] == served.tokenizer.encode(PROMPT).ids
    assert {reply.system_fingerprint for reply in replies} == {whole["system_fingerprint"]}
    assert len({reply.id for reply in replies}) == 1
    assert [reply.HasField("usage") for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1].usage.total_tokens == whole["usage"]["total_tokens"]
    ids = served.tokenizer.encode(PROMPT).ids
    tokens = Methods(served).generate(text=None, tokens=TokenIds(ids=ids), max_tokens=5)
    assert "".join(r.text for r in tokens) == "".join(r.text for r in Methods(served).generate(max_tokens=5))


def test_every_field_of_a_request_is_a_parameter_of_the_interface() -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 7,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x", "y"],
        "stop_token_ids": [3, 4],
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.25,
        "seed": -3,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {5: -2.0},
        "n": 3,
        "echo": False,
        "logprobs": 0,
    }
    names = {field.name for field in GenerateRequest.DESCRIPTOR.fields}
    assert names == {*fields, "text", "tokens"}
    read = completion_request(GenerateRequest(text="", **fields))
    assert read == CompletionRequest(prompt="", **fields)
    assert completion_request(GenerateRequest(text="x")) == CompletionRequest(prompt="x")
    assert completion_request(GenerateRequest(tokens=TokenIds(ids=[1, 2]))).prompt == [1, 2]


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"temperature": -1}, "INVALID_ARGUMENT", "temperature"),
        ({"top_p": -0.1}, "INVALID_ARGUMENT", "top_p"),
        ({"n": 0}, "INVALID_ARGUMENT", "n:"),
        ({"max_tokens": 1000}, "INVALID_ARGUMENT", "max_tokens"),
        ({"min_tokens": 20, "max_tokens": 2}, "INVALID_ARGUMENT", "min_tokens"),
        ({"text": None}, "INVALID_ARGUMENT", "prompt is missing"),
        ({"text": None, "tokens": TokenIds(ids=[9999])}, "INVALID_ARGUMENT", "prompt has token 9999"),
        ({"text": None, "tokens": TokenIds(ids=[-1])}, "INVALID_ARGUMENT", "prompt"),
        ({"logit_bias": {5: 1000.0}}, "INVALID_ARGUMENT", "logit_bias"),
        ({"stop": [""]}, "INVALID_ARGUMENT", "stop"),
        ({"logprobs": 99}, "INVALID_ARGUMENT", "logprobs"),
        ({"model": "gpt-4"}, "NOT_FOUND", "gpt-4"),
    ],
)
def test_a_refusal_has_its_status_and_names_the_parameter(
    served: Served, fields: dict[str, Any], code: str, text: str
) -> None:
    status, details = Methods(served).refused(**{"max_tokens": 4, **fields})
    assert status is grpc.StatusCode[code]
    assert text in details


def test_keys_a_full_queue_and_callers_from_elsewhere() -> None:
    served = Served(Limits(max_queue=0), keys=["secret-of-16-and-more"])
    try:
        methods = Methods(served)
        assert methods.refused()[0] is grpc.StatusCode.UNAUTHENTICATED
        wrong = Context({"authorization": "Bearer wrong"})
        assert methods.refused(wrong)[0] is grpc.StatusCode.UNAUTHENTICATED
        right = Context({"authorization": "Bearer secret-of-16-and-more"})
        assert methods.refused(right)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        far = Context({"authorization": "Bearer secret-of-16-and-more"}, peer="ipv4:192.0.2.9:5")
        assert Methods(served, loopback=True).refused(far)[0] is grpc.StatusCode.PERMISSION_DENIED
    finally:
        served.service.close()


def test_a_failure_of_the_engine_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    try:

        def failing() -> Any:
            raise RaymoeError("expert host host-1 is gone")

        monkeypatch.setattr(served.engine, "step", failing)
        status, details = Methods(served).refused(max_tokens=4)
        assert status is grpc.StatusCode.UNAVAILABLE
        assert "host-1" in details
    finally:
        served.service.close()


def test_who_stops_listening_stops_the_generation(served: Served) -> None:
    async def leave() -> None:
        request = GenerateRequest(text=PROMPT, max_tokens=40, ignore_eos=True)
        replies = Methods(served).Generate(request, grpc_context=Context())
        await anext(replies)
        await replies.aclose()
        await asyncio.wrap_future(served.service.call(lambda: None))  # the engine has processed it
        assert served.engine.pool.held == 0

    asyncio.run(leave())


def test_health_is_that_of_http(served: Served) -> None:
    methods, name = Methods(served), "raymoe.v1.Generation"

    async def ask() -> list[int]:
        checks = [await methods.Check(HealthCheckRequest(service=s), Context()) for s in ("", name)]
        listed = await methods.List(HealthListRequest(), Context())
        watched = await anext(methods.Watch(HealthCheckRequest(), Context()))
        return [one.status for one in (*checks, *listed.statuses.values(), watched)]

    assert set(asyncio.run(ask())) == {HealthCheckResponse.SERVING}
    served.unwell = "expert host host-1 is gone"
    try:
        assert set(asyncio.run(ask())) == {HealthCheckResponse.NOT_SERVING}
    finally:
        served.unwell = None
    context = Context()
    with pytest.raises(RaymoeError):
        asyncio.run(methods.Check(HealthCheckRequest(service="other"), context))
    assert context.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("ipv4:127.0.0.1:4242", True),
        ("ipv6:[::1]:4242", True),
        ("ipv6:%5B::1%5D:4242", True),
        ("ipv6:[::ffff:127.0.0.1]:4242", True),
        ("unix:/tmp/socket", True),
        ("ipv4:192.0.2.1:4242", False),
        ("ipv6:[2001:db8::1]:4242", False),
        ("ipv6:[::ffff:192.0.2.1]:4242", False),
        ("unknown", False),
    ],
)
def test_callers_from_this_machine_are_told_by_their_address(peer: str, here: bool) -> None:
    assert on_this_machine(peer) is here
