"""The load generator: its requests and their times, the figures it computes, and the servers it starts."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import math
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from benchmarks.serving.capacity import Capacity, Level, grows, level_of
from benchmarks.serving.figures import Outcome, concurrency, figures, percentile, tokens_between
from benchmarks.serving.load_client import connected
from benchmarks.serving.load_test import Load, offer
from benchmarks.serving.progress import ProgressLine
from benchmarks.serving.request_mix import (
    CONVERSATION,
    PlannedRequest,
    RequestMix,
    arrivals,
    mix_of,
    rate_of,
    read_span,
)
from errors import ChannelError, ConfigError, DataError, ResourceError
from jobs.cli.main import app

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


Answer = Callable[[web.Request, dict[str, Any], web.StreamResponse], Awaitable[None]]


@asynccontextmanager
async def fake_server(answer: Answer, *, longest: int = 64) -> AsyncIterator[str]:
    """A server whose stream of every request is written by `answer`."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": longest}]})

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["prompt"] == "refused":
            return web.json_response({"error": {"message": "full"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await answer(request, body, response)
        return response

    server = web.Application()
    server.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
    runner = web.AppRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def event(response: web.StreamResponse, body: Any) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    await response.write(f"data: {text}\n\n".encode())


async def whole(_: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    """Two tokens a chunk, as accepted drafts come."""
    for _ in range(0, body["max_tokens"], 2):
        await event(response, {"choices": [{"text": "ab"}], "usage": None})
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    await event(response, {"choices": [], "usage": usage})
    await event(response, "[DONE]")


def ask(**fields: Any) -> PlannedRequest:
    return PlannedRequest(**{"prompt": (5, 6, 7), "max_tokens": 8, "temperature": 0.0, "seed": 1, **fields})


def asked(answer: Answer, request: PlannedRequest, **options: Any) -> Outcome:
    async def run() -> Outcome:
        async with fake_server(answer) as url, connected(f"{url}/v1/", **options) as client:
            return await client.ask(request, due=client.clock() - 1.0)

    return asyncio.run(run())


def test_an_answer_is_read_to_its_end() -> None:
    found = asked(whole, ask())
    assert found.completed
    assert (found.prompt_tokens, found.output_tokens, len(found.chunks)) == (3, 8, 4)
    assert 1.0 <= found.sent - found.due < 30
    assert found.sent <= found.chunks[0] <= found.chunks[-1] <= found.ended


def test_a_client_that_hangs_up_is_no_failure() -> None:
    async def endless(request: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
        with pytest.raises(ConnectionResetError):
            while True:
                await event(response, {"choices": [{"text": "a"}]})
                await asyncio.sleep(0)

    found = asked(endless, ask(drop_after=3))
    assert found.dropped
    assert found.failure is None
    assert not found.completed
    assert found.output_tokens == 3


async def _error(_: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    await event(response, {"choices": [{"text": "a"}]})
    await event(response, {"error": {"message": "a host is gone"}})


async def _short(_: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    await event(response, {"choices": [{"text": "a"}]})


async def _broken(_: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    await event(response, "{")


async def _hang(request: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    await asyncio.Event().wait()


async def _cut(request: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
    await event(response, {"choices": [{"text": "a"}]})
    assert request.transport is not None
    request.transport.abort()


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (_error, "stream error"),
        (_short, "cut short"),
        (_broken, "malformed"),
        (_hang, "timeout"),
        (_cut, "connection"),
    ],
)
def test_failures_are_told_apart(answer: Answer, failure: str) -> None:
    found = asked(answer, ask(), timeout=2.0 if failure == "timeout" else 60.0)
    assert found.failure == failure
    assert found.text
    assert found.ended >= found.sent


def test_a_refusal_carries_the_servers_words() -> None:
    found = asked(whole, ask(prompt="refused"))
    assert (found.failure, found.text) == ("http 429", "full")


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """The server answers only after the last request, which a closed loop would never send."""
    total = 30

    async def run() -> dict[str, Any]:
        there = 0
        everybody = asyncio.Event()

        async def held(request: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
            nonlocal there
            there += 1
            if there > total:
                everybody.set()
            if there > 1:  # the first one only asks whether the server answers
                await everybody.wait()
            await whole(request, body, response)

        load = Load(mix=RequestMix(), rate=200.0, requests=total, duration=None)
        async with fake_server(held) as url:
            return await offer(url, load, lambda _: None)

    found = asyncio.run(run())
    assert found["completed"] == found["max_concurrent_requests"] == total
    assert found["failed"] == 0
    assert (found["model"], found["request_rate"]) == ("fake", 200.0)
    assert found["p50_slip_ms"] >= 0
    assert found["p50_ttft_ms"] > 0


def test_auto_offers_a_share_of_what_was_measured() -> None:
    async def slow(request: web.Request, body: dict[str, Any], response: web.StreamResponse) -> None:
        await asyncio.sleep(0.02)
        await whole(request, body, response)

    async def run() -> dict[str, Any]:
        load = Load(
            mix=RequestMix(), share=0.5, requests=10, duration=None, probe_seconds=0.3, most_concurrency=2
        )
        async with fake_server(slow) as url:
            return await offer(url, load, lambda _: None)

    found = asyncio.run(run())
    assert found["request_rate"] == pytest.approx(0.5 * found["capacity"]["request_throughput"])
    assert [level["concurrency"] for level in found["capacity"]["levels"]] == [1, 2]
    assert found["completed"] == 10


def test_a_server_that_answers_nothing_ends_it_with_its_words() -> None:
    async def run() -> None:
        async with fake_server(_error) as url:
            await offer(url, Load(mix=RequestMix(), rate=1.0, requests=1), lambda _: None)

    with pytest.raises(ResourceError, match="stream error: a host is gone"):
        asyncio.run(run())


@pytest.mark.parametrize("url", ["nonsense", "127.0.0.1:8000", "ftp://host", "http://", "http://a:port", ""])
def test_what_is_no_url_is_one_line(url: str) -> None:
    async def run() -> None:
        async with connected(url):
            pass

    with pytest.raises(ConfigError, match="give http://HOST:PORT") as caught:
        asyncio.run(run())
    assert "\n" not in str(caught.value)


def test_no_server_is_one_line() -> None:
    async def run(url: str) -> None:
        async with connected(url):
            pass

    with pytest.raises(ChannelError, match="give the URL of a server"):
        asyncio.run(run("http://127.0.0.1:9"))

    async def run_other() -> None:
        async def page(_: web.Request) -> web.Response:
            return web.Response(text="hello")

        other = web.Application()
        other.add_routes([web.get("/v1/models", page)])
        runner = web.AppRunner(other)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            await run(f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    with pytest.raises(ChannelError, match="not a list of models"):
        asyncio.run(run_other())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "fast"], "--rate"),
        (["--prompts", "/nowhere"], "--prompts"),
        (["--output-tokens", "9:1"], "--output-tokens"),
        (["http://127.0.0.1:9", "--checkpoint", "x"], "leave out URL"),
        (["--requests", "0"], "--requests"),
    ],
)
def test_wrong_usage_names_it(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_progress_is_one_line_on_a_terminal_and_a_few_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO, *moments: float) -> str:
        clock = iter(moments)
        with ProgressLine(stream, clock=lambda: next(clock)) as show:
            show("a")
            show("b")
        return stream.getvalue()

    assert shown(Terminal(), 0.0, 0.2) == "\r\x1b[Ka\r\x1b[Kb\n"
    assert shown(io.StringIO(), 0.0, 6.0) == "a\nb\n"
    assert shown(io.StringIO(), 0.0, 1.0) == "a\n"
