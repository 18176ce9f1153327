"""Sends load to a server with OpenAI's interface: streamed completions, on one event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from benchmarks.serving.figures import Outcome
from benchmarks.serving.request_mix import PlannedRequest
from errors import ChannelError, ConfigError

Note = Callable[[Outcome], None]
"""Called with the outcome of every request that has ended."""

_CONNECT_SECONDS = 30.0


class LoadClient:
    """Sends requests to one server.

    Args:
        session: HTTP session with the server's root as its base URL.
        model: Name of the model.
        longest: Tokens that prompt and output may have together; None if the server does not say.
        ignore_eos: Have every request generate its full number of tokens.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        model: str,
        *,
        longest: int | None = None,
        ignore_eos: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session = session
        self._ignore_eos = ignore_eos
        self.model, self.longest, self.clock = model, longest, clock

    async def ask(self, ask: PlannedRequest, *, due: float) -> Outcome:
        """Send a request now and read its answer; a failure is part of the outcome."""
        outcome = Outcome(due=due, sent=self.clock())
        try:
            await self._stream(ask, outcome)
        except TimeoutError:
            outcome.failure, outcome.text = "timeout", "no end before the time was up"
        except aiohttp.ClientError as error:
            outcome.failure, outcome.text = "connection", str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            outcome.failure, outcome.text = "malformed", f"{type(error).__name__}: {error}"
        outcome.ended = self.clock()
        return outcome

    async def open_loop(
        self, asks: Iterable[PlannedRequest], arrivals: Iterable[float], note: Note
    ) -> list[Outcome]:
        """Send every request at its scheduled time, however many are still running.

        Args:
            asks: The requests.
            arrivals: Their times in seconds from now, in order.
            note: Called with every outcome.
        """
        began = self.clock()
        outcomes: list[Outcome] = []

        async def one(ask: PlannedRequest, due: float) -> None:
            outcome = await self.ask(ask, due=due)
            outcomes.append(outcome)
            note(outcome)

        async with asyncio.TaskGroup() as tasks:
            for ask, at in zip(asks, arrivals, strict=False):
                await asyncio.sleep(max(0.0, began + at - self.clock()))
                tasks.create_task(one(ask, began + at))
        return outcomes

    async def closed_loop(
        self, asks: Iterator[PlannedRequest], *, concurrency: int, seconds: float, note: Note
    ) -> list[Outcome]:
        """Keep `concurrency` requests running for `seconds`; each one that ends is followed by the next."""
        end = self.clock() + seconds
        outcomes: list[Outcome] = []

        async def one_after_another() -> None:
            while self.clock() < end:
                outcome = await self.ask(next(asks), due=self.clock())
                outcomes.append(outcome)
                note(outcome)
                if outcome.failure is not None:
                    return  # do not send more to a server that refuses requests

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(one_after_another())
        return outcomes

    async def _stream(self, ask: PlannedRequest, outcome: Outcome) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self._ignore_eos else {}),
        }
        async with self._session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                outcome.failure, outcome.text = f"http {response.status}", _said(await response.text())
                return
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    outcome.failure, outcome.text = "stream error", _said(data.decode())
                    return
                if event.get("usage"):
                    outcome.prompt_tokens = event["usage"]["prompt_tokens"]
                    outcome.output_tokens = event["usage"]["completion_tokens"]
                if event["choices"]:
                    outcome.chunks.append(self.clock())
                    if len(outcome.chunks) == ask.drop_after:
                        outcome.dropped, outcome.output_tokens = True, len(outcome.chunks)
                        response.close()
                        return
        outcome.failure, outcome.text = "cut short", "the stream ended without [DONE]"


@asynccontextmanager
async def connected(
    url: str, *, api_key: str | None = None, ignore_eos: bool = True, timeout: float = 600.0
) -> AsyncIterator[LoadClient]:
    """A client for the first model of a server.

    Args:
        url: URL of its root, with or without `/v1`.
        api_key: API key sent with every request.
        ignore_eos: Have every request generate its full number of tokens.
        timeout: Seconds after which a request fails.

    Raises:
        ConfigError: The URL is invalid.
        ChannelError: No server answers at the URL, or it does not have OpenAI's interface.
    """
    base = url.rstrip("/").removesuffix("/v1")
    _check_url(base)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(
        base_url=base,
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),  # the number of connections follows from the schedule
        timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT_SECONDS),
    ) as session:
        card = await _model_card(session, base)
        yield LoadClient(session, str(card["id"]), longest=card.get("max_model_len"), ignore_eos=ignore_eos)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        good = False
    if not good:
        raise ConfigError(f"URL is {url!r}; give http://HOST:PORT of a server, or leave it out")


async def _model_card(session: aiohttp.ClientSession, base: str) -> dict[str, Any]:
    try:
        async with session.get("/v1/models") as response:
            text = await response.text()
            if response.status == 200:
                card: dict[str, Any] = json.loads(text)["data"][0]
                return card
            said = f"{response.status}: {_said(text)}"
    except (aiohttp.ClientError, TimeoutError) as error:
        said = str(error) or type(error).__name__
    except (ValueError, KeyError, IndexError, TypeError):
        said = "an answer that is not a list of models"
    raise ChannelError(f"{base}/v1/models: {said}; give the URL of a server with OpenAI's interface")


def _said(text: str) -> str:
    """The message of an error in OpenAI's format, or the first line of another text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return (text.strip().splitlines() or ["no text"])[0][:200]


__all__ = ["LoadClient", "Note", "connected"]
