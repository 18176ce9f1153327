"""Concurrent streams from a server, their answers, and the longest pause within a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
from openai import AsyncOpenAI

from support.commands.serve import PROMPT, ServeProcess

Told = tuple[str, tuple[str, ...], tuple[float, ...], str | None]


@dataclass
class StreamLoad:
    """Streams that run together.

    Attributes:
        requests: Arguments of the completions.
        chunks: Number of chunks received, over all streams.
        gap: Longest time between two chunks of one stream, in seconds.
        told: Text, tokens, log probabilities and finish reason of each stream.
    """

    server: ServeProcess
    requests: list[dict[str, Any]]
    chunks: int = 0
    gap: float = 0.0
    told: list[Told] = field(default_factory=list)

    async def run(self) -> list[Told]:
        """Run all streams to their end."""
        async with self.server.async_client as client:
            self.told = await asyncio.gather(*(self._one(client, request) for request in self.requests))
        return self.told

    async def _one(self, client: AsyncOpenAI, request: dict[str, Any]) -> Told:
        stream = await client.completions.create(**request, stream=True)
        text, tokens, logprobs, reason = "", [], [], None
        last = time.monotonic()
        async for chunk in stream:
            now = time.monotonic()
            self.gap, last = max(self.gap, now - last), now
            self.chunks += 1
            choice = chunk.choices[0]
            text += choice.text
            reason = choice.finish_reason or reason
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens or []
                logprobs += [round(value or 0.0, 6) for value in choice.logprobs.token_logprobs or []]
        return text, tuple(tokens), tuple(logprobs), reason


def greedy_requests(streams: int, tokens: int) -> list[dict[str, Any]]:
    """Greedy requests with different prompts and lengths."""
    return [
        {
            "model": "tiny",
            "prompt": PROMPT[: 3 + index % 11],
            "max_tokens": tokens + index,
            "temperature": 0.0,
            "extra_body": {"ignore_eos": True},
        }
        for index in range(streams)
    ]


async def disturbed(load: StreamLoad, at: int, disturb: Callable[[], object]) -> StreamLoad:
    """Run a load and disturb it, in another thread, once `at` chunks have come."""
    running = asyncio.create_task(load.run())
    while load.chunks < at and not running.done():
        await asyncio.sleep(0.002)
    assert not running.done(), "it ended before it was disturbed"
    try:
        await asyncio.to_thread(disturb)
    finally:
        await running
    return load


def actors(server: ServeProcess, title: str) -> list[psutil.Process]:
    """The server's processes of this title, oldest first."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.create_time())


HOST, COORDINATOR = "_ExpertHostProcess", "_CoordinatorProcess"
TRUNK, INTERFACE = "ServeReplica:raymoe:trunk", "ServeReplica:raymoe:api"

__all__ = [
    "COORDINATOR",
    "HOST",
    "INTERFACE",
    "TRUNK",
    "StreamLoad",
    "Told",
    "actors",
    "disturbed",
    "greedy_requests",
]
