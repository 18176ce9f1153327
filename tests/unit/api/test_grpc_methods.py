"""The gRPC methods of the interface, over an engine in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest

from errors import RaymoeError
from jobs.api.backend import Limits
from jobs.api.grpc_generation import completion_request
from jobs.api.grpc_guard import CallRefused
from jobs.api.request_bodies import CompletionRequest
from jobs.serving.interface.grpc_methods import GrpcMethods
from protos.generation_pb2 import GenerateReply, GenerateRequest, TokenIds
from support.api_server import PROMPT, Served


class Methods(GrpcMethods):
    def __init__(self, served: Served) -> None:
        super().__init__(served.backend)

    def generate(self, **fields: Any) -> list[GenerateReply]:
        fields = {"text": PROMPT, "temperature": 0, **fields}

        async def collect() -> list[GenerateReply]:
            request = GenerateRequest(**fields)
            return [reply async for reply in self.Generate(request, None)]

        return asyncio.run(collect())

    def refused(self, **fields: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(CallRefused) as caught:
            self.generate(**fields)
        return caught.value.code, caught.value.details


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
        ({"text": None, "tokens": TokenIds(ids=[9999])}, "INVALID_ARGUMENT", "prompt[0] is token 9999"),
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


def test_a_full_queue_is_a_status_of_its_own() -> None:
    served = Served(Limits(max_queue=0))
    try:
        assert Methods(served).refused()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        served.service.close()


def test_a_refusal_does_not_repeat_a_message_of_any_size(served: Served) -> None:
    status, details = Methods(served).refused(model="m" * 1_000_000)
    assert status is grpc.StatusCode.NOT_FOUND and "there is no model" in details
    assert len(details) <= 500
    answer = served.complete(model="m" * 1_000_000)
    assert answer.status_code == 404 and len(answer.text) < 3000
    assert len(served.complete(**{"p" * 1_000_000: 1}).text) < 5000


def test_lists_longer_than_any_valid_one_are_refused_before_they_are_unpacked(served: Served) -> None:
    methods = Methods(served)
    wide: dict[str, Any] = {"stop": ["x"] * 5000, "stop_token_ids": [1] * 5000}
    for name, value in {**wide, "logit_bias": dict.fromkeys(range(5000), 1.0)}.items():
        status, details = methods.refused(**{name: value})
        assert status is grpc.StatusCode.INVALID_ARGUMENT and details.startswith(f"{name} has 5000 entries")
    status, details = methods.refused(text=None, tokens=TokenIds(ids=range(100_000)))
    assert status is grpc.StatusCode.INVALID_ARGUMENT and "100000 tokens" in details


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
        replies = Methods(served).Generate(request, None)
        await anext(replies)
        await replies.aclose()
        await asyncio.wrap_future(served.service.call(lambda: None))  # the engine has processed it
        assert served.engine.pool.held == 0

    asyncio.run(leave())


def test_health_is_that_of_http(served: Served) -> None:
    methods, name = Methods(served), "raymoe.v1.Generation"

    async def ask() -> list[int]:
        methods = Methods(served)
        checks = [await methods.Check(HealthCheckRequest(service=s), None) for s in ("", name)]
        listed = await methods.List(HealthListRequest(), None)
        watched = await anext(methods.Watch(HealthCheckRequest(), None))
        return [one.status for one in (*checks, *listed.statuses.values(), watched)]

    assert set(asyncio.run(ask())) == {HealthCheckResponse.SERVING}
    served.unwell = "expert host host-1 is gone"
    try:
        assert set(asyncio.run(ask())) == {HealthCheckResponse.NOT_SERVING}
    finally:
        served.unwell = None
    with pytest.raises(CallRefused) as caught:
        asyncio.run(methods.Check(HealthCheckRequest(service="other"), None))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
