"""Token usage and metrics count every token once, however an answer is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from engine.delta import Delta
from engine.settings import EngineSettings
from jobs.api.serving_metrics import ServingMetrics
from support.api_requests import over_grpc
from support.api_server import PROMPT, Served, events


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served(settings=EngineSettings(cache_tokens=512, page_size=2))
    yield made
    assert made.engine.pool.held == 0
    made.service.close()


def usages(served: Served, **body: Any) -> list[dict[str, Any]]:
    """The usage of a request over HTTP, whole and streamed, and over gRPC."""
    whole = served.complete(**body).json()["usage"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = events(served.complete(**body, **options))[-2]["usage"]
    seen = asyncio.run(over_grpc(served, {"prompt": PROMPT, "temperature": 0, **body}))
    over = {**seen.usage, "prompt_tokens_details": {"cached_tokens": seen.cached}}
    return [whole, streamed, over]


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": 1}], ids=str)
def test_an_echo_alone_completes_no_token(served: Served, logprobs: dict[str, int]) -> None:
    prompt = len(served.tokenizer.encode(PROMPT).ids)
    generated = metric(served, "generation_tokens_total")
    for usage in usages(served, max_tokens=0, echo=True, **logprobs):
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
            prompt,
            0,
            prompt,
        )
    assert metric(served, "generation_tokens_total") == generated


def test_a_prompt_of_several_choices_counts_once(served: Served) -> None:
    prompt = len(served.tokenizer.encode(PROMPT).ids)
    for _ in range(2):  # the second time the prompt is in the cache
        before = metric(served, "prompt_tokens_total")
        for usage in usages(served, n=4, max_tokens=3):
            assert usage["prompt_tokens"] == prompt
            assert usage["completion_tokens"] == 12
            assert usage["prompt_tokens_details"]["cached_tokens"] <= prompt
        assert metric(served, "prompt_tokens_total") == before + 3 * prompt
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == (prompt - 1) // 2 * 2, "all full pages but that of the last token, which is computed"


def test_a_prompt_as_long_as_the_model_takes_can_be_scored(served: Served) -> None:
    longest = served.backend.longest
    body = {"prompt": [5] * longest, "echo": True, "logprobs": 0}
    choice = served.complete(max_tokens=0, **body).json()["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == longest
    assert choice["finish_reason"] == "length"
    assert served.complete(max_tokens=1, **body).status_code == 400
    body["prompt"].append(5)
    assert served.complete(max_tokens=0, **body).status_code == 400


def metric(served: Served, name: str) -> float:
    found = served.backend.metrics.registry.get_sample_value(f"raymoe_{name}", {"model_name": "tiny"})
    assert found is not None
    return found


def test_latencies_between_tokens_add_up_to_the_time_between_first_and_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics, now = ServingMetrics("tiny"), 0.0
    monkeypatch.setattr("jobs.api.serving_metrics.time.perf_counter", lambda: now)
    timing = metrics.timing(0.0)
    arrivals = [
        (1.0, [(0, [1, 2, 3]), (1, [1])]),  # three tokens at once
        (1.5, [(0, [4])]),
        (4.5, [(0, [5, 6]), (0, [7]), (1, [2, 3])]),  # two deltas of a choice at once
        (5.0, [(1, [])]),
        (6.0, [(0, [8]), (1, [4])]),
    ]
    for at, arrived in arrivals:
        now = at
        timing.note([(index, Delta(tokens=tokens)) for index, tokens in arrived])

    def read(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"raymoe_{name}", {"model_name": "tiny"})

    assert read("generation_tokens_total") == 12
    assert read("time_to_first_token_seconds_count") == 2
    assert read("inter_token_latency_seconds_count") == 10
    assert read("inter_token_latency_seconds_sum") == pytest.approx((6.0 - 1.0) + (6.0 - 1.0))
