"""Any request has one answer: whole, streamed and over gRPC, alone and beside others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.settings import EngineSettings
from jobs.api import build_api
from support.api_requests import AnswerSeen, over_grpc, random_request, streamed, whole
from support.api_server import Served
from support.tokenizers import byte_fallback, byte_level

GROUP = 6  # requests at a time


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda kind: kind.__name__)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    kind: Callable[[], tuple[Tokenizer, int]] = request.param
    settings = EngineSettings(cache_tokens=2048, page_size=4, pace_drafts=False)
    made = Served(tokenizer=kind(), dtype=torch.float64, settings=settings)
    yield made
    assert made.engine.pool.held == 0
    made.service.close()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "count"), [(0, 30), pytest.param(30, 570, marks=pytest.mark.soak)])
def test_any_request_has_one_answer(served: Served, first: int, count: int) -> None:
    async def ask() -> None:
        api, vocabulary = build_api(lambda: served.backend), served.tokenizer.get_vocab_size()
        for start in range(first, first + count, GROUP):
            numbers = range(start, min(start + GROUP, first + count))
            bodies = [random_request(random.Random(number), vocabulary) for number in numbers]
            alone = [await whole(api, body) for body in bodies]
            for body, answer in zip(bodies, alone, strict=True):
                assert_whole(served, body, answer)
            together = await asyncio.gather(
                *(_ask(served, api, body, number) for number, body in zip(numbers, bodies, strict=True))
            )
            for body, one, other in zip(bodies, alone, together, strict=True):
                assert_same(body, one, other)
            assert_same(bodies[0], alone[0], await streamed(api, bodies[0]))

    asyncio.run(ask())


async def _ask(served: Served, api: Any, body: dict[str, Any], number: int) -> AnswerSeen:
    """Ask in one of three ways."""
    prompt = body.get("prompt")
    if number % 3 == 0 and prompt is not None and (isinstance(prompt, str) or isinstance(prompt[0], int)):
        return await over_grpc(served, body)
    return await (whole if number % 3 == 1 else streamed)(api, body)


def assert_same(body: dict[str, Any], one: AnswerSeen, other: AnswerSeen) -> None:
    """Compare the whole answer with another form of it; gRPC has ids in place of texts and offsets."""
    assert one.usage == other.usage, body
    assert other.cached <= other.usage["prompt_tokens"], body
    for mine, its in zip(one.choices, other.choices, strict=True):
        assert (mine.text, mine.finish_reason) == (its.text, its.finish_reason), body
        assert mine.values == pytest.approx(its.values, abs=1e-9), body
        if its.token_ids:
            assert len(its.token_ids) == len(mine.tokens) or not mine.tokens, body
            continue
        assert (mine.tokens, mine.offsets) == (its.tokens, its.offsets), body
        assert len(mine.top) == len(its.top), body
        for top, its_top in zip(mine.top, its.top, strict=True):
            assert _plain(top) == pytest.approx(_plain(its_top), abs=1e-9), body


def _plain(top: Any) -> dict[Any, float]:
    """The likeliest tokens of one position, in either format."""
    if isinstance(top, list):
        return {(token, bytes(data)): value for token, data, value in top}
    return dict(top or {})


def assert_whole(served: Served, body: dict[str, Any], answer: AnswerSeen) -> None:
    """Check an answer by itself: its usage by what was asked, and its positions by the text."""
    prompts = _prompts(served, body)
    n = body.get("n", 1)
    assert len(answer.choices) == n * len(prompts)
    assert answer.cached <= answer.usage["prompt_tokens"]
    if "prompt" in body:
        assert answer.usage["prompt_tokens"] == sum(map(len, prompts)), body
    assert answer.usage["completion_tokens"] <= body["max_tokens"] * len(answer.choices)
    assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + answer.usage["completion_tokens"]
    if body["max_tokens"] == 0:
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
    for at, choice in enumerate(answer.choices):
        prompt = prompts[at // n] if body.get("echo") else []
        shown = _given(served, body)[at // n] if body.get("echo") else []  # nothing of an empty prompt
        echoed = served.tokenizer.decode(shown, skip_special_tokens=False) if shown else ""
        assert choice.text.startswith(echoed)
        if choice.offsets:
            assert choice.offsets == sorted(choice.offsets)
            assert choice.offsets[0] == 0
            if len(choice.offsets) > len(prompt):
                assert choice.offsets[len(prompt)] == len(echoed)
    if "messages" not in body and body.get("logprobs") is not None:
        counted = sum(len(choice.tokens) for choice in answer.choices)
        echoes = n * sum(map(len, prompts)) if body.get("echo") else 0
        assert answer.usage["completion_tokens"] == counted - echoes, body


def _given(served: Served, body: dict[str, Any]) -> list[list[int]]:
    """The tokens of each prompt of a completion; of a chat one prompt, whose tokens do not matter."""
    given = body.get("prompt", [[0]])
    given = given if given and not isinstance(given, str) and not isinstance(given[0], int) else [given]
    return [
        served.tokenizer.encode(one, add_special_tokens=False).ids if isinstance(one, str) else one
        for one in given
    ]


def _prompts(served: Served, body: dict[str, Any]) -> list[list[int]]:
    """The tokens of each prompt as the model reads it: an empty one is the token that ends a text."""
    return [one or [served.backend.end_of_text] for one in _given(served, body)]
