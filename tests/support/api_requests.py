"""Random requests to the interface, and their answers in a form that whole and streamed ones share."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.api.grpc_generation import generate
from protos.generation_pb2 import GenerateRequest, TokenIds
from support.api_server import Served

TEXTS = ("the cat sat", "on the mat 猫", "ünï", "", "def the")
STOPS = ("a", "t", " ", "é", "xy", "T", "(", "0", "the")


@dataclass
class ChoiceSeen:
    """What a client has received of one choice."""

    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[Any] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def take(self, part: dict[str, Any]) -> None:
        """Add an entry of `choices`, of a whole answer or of a chunk."""
        assert self.finish_reason is None, "nothing comes after the end"
        self.finish_reason = part["finish_reason"]
        if "text" in part:
            self.text += part["text"]
        else:
            self.text += (part.get("message") or part["delta"]).get("content", "")
        shown = part["logprobs"] or {}
        if "tokens" in shown:
            lengths = {
                len(shown[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            }
            assert len(lengths) == 1
            self.tokens += shown["tokens"]
            self.values += shown["token_logprobs"]
            self.top += shown["top_logprobs"]
            self.offsets += shown["text_offset"]
        for entry in shown.get("content", ()):
            self.tokens.append((entry["token"], entry["bytes"]))
            self.values.append(entry["logprob"])
            self.top.append([(one["token"], one["bytes"], one["logprob"]) for one in entry["top_logprobs"]])


@dataclass
class AnswerSeen:
    """What a client has received of an answer; `cached` depends on earlier requests, and so is apart."""

    choices: list[ChoiceSeen]
    usage: dict[str, int]
    cached: int


def random_request(source: random.Random, vocabulary: int) -> dict[str, Any]:
    """A request of either kind, whose tokens are a function of it; `messages` tells the kinds apart."""
    chat = source.random() < 0.3
    body: dict[str, Any] = {"max_tokens": source.choice((1, 2, 5, 9))}
    if chat:
        body["messages"] = [{"role": "user", "content": source.choice(TEXTS)}]
        if source.random() < 0.5:
            body |= {"logprobs": True, "top_logprobs": source.randrange(4)}
    else:
        body["prompt"] = _random_prompt(source, vocabulary)
        if source.random() < 0.6:
            body["logprobs"] = source.randrange(4)
        if source.random() < 0.4:
            body["echo"] = True
            if source.random() < 0.4:
                body["max_tokens"] = 0
    optional: dict[str, Any] = {
        "n": source.choice((1, 2, 3)),
        "temperature": source.choice((0, 0.7, 1, 2)),
        "top_p": source.choice((0, 0.5, 1)),
        "top_k": source.choice((0, 1, 20)),
        "min_p": source.choice((0, 0.01)),
        "stop": source.choice((source.choice(STOPS), source.sample(STOPS, 3))),
        "stop_token_ids": [source.randrange(vocabulary) for _ in range(20)],
        "ignore_eos": True,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {str(source.randrange(vocabulary)): source.choice((-100, 5, 100))},
    }
    body |= {name: value for name, value in optional.items() if source.random() < 0.25}
    if body["max_tokens"] > 2 and source.random() < 0.2:
        body["min_tokens"] = source.randrange(body["max_tokens"])
    return {**body, "seed": source.randrange(-3, 1000)}


def _random_prompt(source: random.Random, vocabulary: int) -> Any:
    def ids() -> list[int]:
        return [source.randrange(vocabulary) for _ in range(source.randrange(1, 12))]

    kind = source.randrange(4)
    if kind == 0:
        return ids()
    if kind == 1:
        return [ids() for _ in range(2)]
    return source.choice(TEXTS) if kind == 2 else list(source.sample(TEXTS, 2))


async def whole(api: Any, body: dict[str, Any]) -> AnswerSeen:
    """The answer of an ASGI application to a request, in one piece."""
    read = json.loads(await _posted(api, body))
    return _seen(read["choices"], read["usage"])


async def streamed(api: Any, body: dict[str, Any]) -> AnswerSeen:
    """The answer of an ASGI application to a request, as a stream."""
    text = await _posted(api, {**body, "stream": True, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and last["choices"] == []
    return _seen([part for chunk in chunks for part in chunk["choices"]], last["usage"])


async def over_grpc(served: Served, body: dict[str, Any]) -> AnswerSeen:
    """The answer to a completion with one prompt over gRPC, as far as its replies tell what HTTP's do."""
    fields = {**body, "stop": [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])}
    prompt = fields.pop("prompt")
    biases = {int(token): float(value) for token, value in fields.pop("logit_bias", {}).items()}
    message = GenerateRequest(
        **fields,
        logit_bias=biases,
        **({"text": prompt} if isinstance(prompt, str) else {"tokens": TokenIds(ids=prompt)}),
    )
    choices = [ChoiceSeen() for _ in range(body.get("n", 1))]
    async for reply in generate(served.backend, message):
        choice = choices[reply.index]
        choice.text += reply.text
        choice.token_ids += reply.token_ids
        choice.values += [at.token if at.HasField("token") else None for at in reply.logprobs]
        choice.finish_reason = reply.finish_reason or choice.finish_reason
        counted = reply.usage
    usage = {name: getattr(counted, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return AnswerSeen(choices, usage, counted.cached_tokens)


async def _posted(api: Any, body: dict[str, Any]) -> str:
    """The text of the answer to a body, in this event loop; many can be asked for at a time."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    headers = [(b"host", b"test"), (b"content-type", b"application/json")]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"},
        **{"scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
        **{"headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80), "state": {}},
    }
    sent, status, text = False, 0, b""

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.sleep(3600)  # the client stays
        sent = True
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, text
        status = message.get("status", status)
        text += message.get("body", b"")

    await api(scope, receive, send)
    assert status == 200, (text, body)
    return text.decode()


def _seen(parts: Sequence[dict[str, Any]], usage: dict[str, Any]) -> AnswerSeen:
    choices = [ChoiceSeen() for _ in range(1 + max(part["index"] for part in parts))]
    for part in parts:
        choices[part["index"]].take(part)
    cached = usage.pop("prompt_tokens_details")["cached_tokens"]
    return AnswerSeen(choices, usage, cached)


__all__ = ["AnswerSeen", "ChoiceSeen", "over_grpc", "random_request", "streamed", "whole"]
