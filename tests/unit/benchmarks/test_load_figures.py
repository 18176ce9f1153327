"""The load that a server is measured with, and the figures of a run."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.capacity import Capacity, Level, grows, level_of
from benchmarks.serving.figures import Outcome, concurrency, figures, percentile, tokens_between
from benchmarks.serving.request_mix import (
    CONVERSATION,
    RequestMix,
    arrivals,
    mix_of,
    rate_of,
    read_span,
)
from errors import ConfigError, DataError, ResourceError

PLAIN = {
    "prompt_tokens": None,
    "output_tokens": None,
    "temperature": 0.0,
    "drops": 0.0,
    "seed": 0,
}


def test_arrivals_are_a_poisson_process() -> None:
    moments = list(arrivals(50.0, seed=1, count=20000, duration=None))
    gaps = [after - before for before, after in itertools.pairwise([0.0, *moments])]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # an exponential's is its mean
    assert statistics.correlation(gaps[1:], gaps[:-1]) == pytest.approx(0.0, abs=0.03)


def test_arrivals_end_with_their_count_or_their_time() -> None:
    assert len(list(arrivals(10.0, seed=0, count=7, duration=None))) == 7
    some = list(arrivals(10.0, seed=0, count=None, duration=5.0))
    assert 25 < len(some) < 80
    assert max(some) < 5.0
    assert some == list(arrivals(10.0, seed=0, count=None, duration=5.0))
    assert some != list(arrivals(10.0, seed=1, count=None, duration=5.0))
    for rate, count in ((0.0, 1), (-1.0, 1), (math.nan, 1), (1.0, None)):
        with pytest.raises(ConfigError):
            arrivals(rate, seed=0, count=count, duration=None)


def test_the_default_mix_is_what_it_says() -> None:
    asks = list(itertools.islice(RequestMix(drops=0.25, temperatures=(0.0, 0.8)).asks(), 8000))
    long_prompts = [ask for ask in asks if len(ask.prompt) >= 256]
    assert len(long_prompts) / len(asks) == pytest.approx(CONVERSATION[2].share, abs=0.02)
    assert {ask.max_tokens for ask in long_prompts} == set(range(8, 33))
    assert sum(ask.drop_after is not None for ask in asks) / len(asks) == pytest.approx(0.25, abs=0.02)
    assert all(1 <= ask.drop_after < ask.max_tokens for ask in asks if ask.drop_after is not None)
    assert sum(ask.temperature > 0 for ask in asks) / len(asks) == pytest.approx(0.5, abs=0.02)
    assert len({ask.prompt for ask in asks}) == len(asks)  # nothing for a prefix cache to find


def test_a_mix_is_the_same_each_time_and_fits_the_server() -> None:
    mix = RequestMix(longest=100, seed=3)
    asks = list(itertools.islice(mix.asks(), 500))
    assert asks == list(itertools.islice(mix.asks(), 500))
    assert asks != list(itertools.islice(RequestMix(longest=100, seed=4).asks(), 500))
    assert max(len(ask.prompt) + ask.max_tokens for ask in asks) == 100


def test_a_mix_of_options(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    mix = mix_of(file, **{**PLAIN, "output_tokens": "5"})
    assert [(ask.prompt, ask.max_tokens) for ask in itertools.islice(mix.asks(), 3)] == [
        ("one", 5),
        ("two", 5),
        ("one", 5),
    ]
    spans = mix_of(None, **{**PLAIN, "prompt_tokens": "3:4"})
    assert {len(ask.prompt) for ask in itertools.islice(spans.asks(), 50)} == {3, 4}
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        mix_of(file, **{**PLAIN, "prompt_tokens": "3"})
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="--prompts"):
            mix_of(wrong, **PLAIN)
    file.write_text("\n \n")
    with pytest.raises(DataError, match="no line"):
        mix_of(file, **PLAIN)


@pytest.mark.parametrize("text", ["", "0", "5:3", "a:b", "-1:4", "1:2:3"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-tokens"):
        read_span(text, "--output-tokens")


def test_a_rate_is_a_number_or_auto() -> None:
    assert rate_of("auto") is None
    assert rate_of("2.5") == 2.5
    for wrong in ("0", "-1", "nan", "inf", "fast"):
        with pytest.raises(ConfigError, match="--rate"):
            rate_of(wrong)


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile(list(range(101)), 99) == 99
    assert percentile([7.0], 90) == 7.0
    assert math.isnan(percentile([], 50))


def outcome(due: float, chunks: list[float], tokens: int, **fields: Any) -> Outcome:
    fields = {"sent": due, "ended": chunks[-1] if chunks else due, **fields}
    return Outcome(due=due, chunks=chunks, output_tokens=tokens, prompt_tokens=10, **fields)


def test_figures_of_a_run_worked_out_by_hand() -> None:
    found = figures(
        [
            outcome(100.0, [101.0, 102.0, 103.0], 5, sent=100.5),
            outcome(101.0, [104.0, 104.5], 2, ended=105.0),
            outcome(102.0, [103.0], 1, dropped=True),
            outcome(103.0, [], 0, failure="http 429", ended=103.5),
        ],
        began=100.0,
    )
    assert (found["completed"], found["failed"], found["dropped"]) == (2, 1, 1)
    assert found["errors"] == {"http 429": 1}
    assert found["duration"] == 5.0
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 7)
    assert found["request_throughput"] == 0.4
    assert found["output_throughput"] == 1.4
    assert found["p50_ttft_ms"] == 2000  # of 1 s and 3 s, from the moment they were due
    assert found["mean_itl_ms"] == pytest.approx(1000 * 2.5 / 3)
    assert found["p50_tpot_ms"] == 500  # 2 s over 4 tokens, half a second over 1
    assert found["p50_e2el_ms"] == 3500
    assert found["max_slip_ms"] == 500
    assert found["max_concurrent_requests"] == 3
    assert found["mean_concurrent_requests"] == pytest.approx((2.5 + 4 + 1 + 0.5) / 4.5)


def test_a_request_that_ends_as_another_begins_is_not_beside_it() -> None:
    assert concurrency([outcome(0.0, [1.0], 1), outcome(1.0, [2.0], 1)]) == (1, 1.0)
    assert concurrency([]) == (0, 0.0)


def test_tokens_count_where_they_came() -> None:
    one = outcome(0.0, [1.0, 2.0, 3.0, 4.0], 8)
    assert tokens_between([one], 0.0, 2.5) == 4.0
    assert tokens_between([one], 2.0, 4.0) == 4.0
    assert tokens_between([one, one], 0.0, 10.0) == 16.0


def test_a_level_counts_requests_under_way_by_their_tokens() -> None:
    steady = [outcome(0.0, [0.1 * i for i in range(1, 201)], 200)]
    level = level_of(steady, concurrency=1, began=0.0, seconds=10.0)
    assert level.tokens_per_second == pytest.approx(10.0, rel=0.02)
    assert (level.requests, level.tokens) == (1, 200)
    with pytest.raises(ResourceError, match="http 500"):
        level_of([outcome(0.0, [], 0, failure="http 500")], concurrency=1, began=0.0, seconds=1.0)


def test_capacity_is_where_throughput_stops_growing() -> None:
    def levels(*speeds: float) -> tuple[Level, ...]:
        return tuple(
            Level(concurrency=2**i, tokens_per_second=speed, requests=10, tokens=10 * 20)
            for i, speed in enumerate(speeds)
        )

    assert grows(levels())
    assert grows(levels(100, 190, 188))
    assert not grows(levels(100, 190, 195, 180))
    assert grows(levels(100, 190, 195, 260))
    found = Capacity(levels=levels(100, 190, 195, 180))
    assert found.best.concurrency == 4
    assert found.requests_per_second == pytest.approx(195 / 20)
