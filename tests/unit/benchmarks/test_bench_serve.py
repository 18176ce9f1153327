"""The load generator: its requests and their times, the figures it computes, and the servers it starts."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from benchmarks.serving.figures import Outcome
from benchmarks.serving.load_client import connected
from benchmarks.serving.load_test import Load, offer
from benchmarks.serving.progress import ProgressLine
from benchmarks.serving.request_mix import (
    PlannedRequest,
    RequestMix,
)
from errors import ChannelError, ConfigError, ResourceError
from jobs.cli.app import app

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
