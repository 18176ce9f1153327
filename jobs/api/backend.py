"""A served model as the interface sees it: who generates, its texts, its limits."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import Tokenizer

from engine.params import SamplingParams
from engine.service import Delta, Listener
from errors import ConfigError, QueueFull
from jobs.api.api_errors import ApiError, invalid
from jobs.api.chat_template import ChatTemplate
from jobs.api.serving_metrics import EngineFigures, ExpertFigures, ServingMetrics

_RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is taken.

    Attributes:
        max_queue: requests that may wait at a replica; one more is told to come back.
        max_prompt: tokens of a prompt; None takes what the model takes.
        max_tokens: tokens that a request may ask for; None takes what the model takes.
        api_keys: of which a request must carry one; none needed when empty.
    """

    max_queue: int = 256
    max_prompt: int | None = None
    max_tokens: int | None = None
    api_keys: tuple[str, ...] = ()


class Service(Protocol):
    """Generates: an engine in this process, or replicas of the trunk in others."""

    def submit(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        limit: int | None = None,
    ) -> Future[None] | asyncio.Future[None]:
        """Take a request; `listener` hears every delta, in whatever thread.

        Args:
            limit: requests that may wait already.

        Returns:
            Done when it is taken, with a ConfigError if it will not be, or with QueueFull.
        """
        ...

    def cancel(self, id: str) -> object:
        """Drop a request; its listener hears no more."""
        ...


async def _no_engines() -> Mapping[str, EngineFigures]:
    return {}


async def _no_experts() -> ExpertFigures | None:
    return None


@dataclass(slots=True, kw_only=True)
class Backend:
    """One process of the interface.

    Attributes:
        model: its name.
        version: says which weights are in use; every answer carries that of those that computed it.
        longest: tokens that prompt and answer may have together.
        end_of_text: token that ends a text.
        health: says what is wrong, or None.
        engines: says how the engines stand, by their names.
        experts: says how the expert hosts stand, if there are some.
    """

    model: str
    version: Callable[[], str]
    service: Service
    tokenizer: Tokenizer
    chat: ChatTemplate
    longest: int
    end_of_text: int
    limits: Limits
    health: Callable[[], Awaitable[str | None]]
    engines: Callable[[], Awaitable[Mapping[str, EngineFigures]]] = _no_engines
    experts: Callable[[], Awaitable[ExpertFigures | None]] = _no_experts
    metrics: ServingMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    _longest_token: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))

    def check_key(self, authorization: str | None) -> None:
        """Let a caller in.

        Args:
            authorization: `Bearer KEY`, as a header or as metadata.

        Raises:
            ApiError: a key is needed, and this is none.
        """
        keys = self.limits.api_keys
        given = (authorization or "").removeprefix("Bearer ").encode()
        if keys and not any(hmac.compare_digest(given, key.encode()) for key in keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_model(self, name: str | None) -> None:
        """Hold the name that a request gives against the model's; None is fine.

        Raises:
            ApiError: it is another.
        """
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"there is no model {name!r}; this is {self.model!r}",
                param="model",
                code="model_not_found",
            )

    def encode(self, text: str, param: str) -> list[int]:
        """Tokens of a text.

        Raises:
            ApiError: it has halves of surrogate pairs, or is too long by far.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise invalid(f"{param} has half of a surrogate pair, which is no character", param) from error
        if len(text) > self.longest * self._longest_token:  # not to spend seconds on what cannot fit
            raise invalid(f"{param} has {len(text)} characters, too many for {self.longest} tokens", param)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def room(self, prompt: Sequence[int], wanted: int | None, param: str) -> int:
        """Tokens that may be generated after a prompt.

        Raises:
            ApiError: the prompt is too long, or leaves less room than is wanted.
        """
        longest_prompt = min(self.longest - 1, self.limits.max_prompt or self.longest)
        if len(prompt) > longest_prompt:
            raise invalid(f"the prompt has {len(prompt)} tokens; {longest_prompt} at most", "prompt")
        room = min(self.longest - len(prompt), self.limits.max_tokens or self.longest)
        if wanted is None:
            return room
        if wanted > room:
            raise invalid(
                f"{param} is {wanted}, but after a prompt of {len(prompt)} tokens there is room for {room}",
                param,
            )
        return wanted

    async def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Deltas of several choices as they come, all that there are, each with the index of its choice.

        Whoever stops listening stops the generation.

        Raises:
            ApiError: the queue is full, or the engine refuses the request.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        open_: dict[int, str] = {}
        began = time.perf_counter()
        try:
            taken: list[asyncio.Future[None]] = []
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                open_[index] = f"{index}-{uuid.uuid4().hex}"

                def hear(delta: Delta, index: int = index) -> None:
                    loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

                # A queue has room for a request as a whole or not at all: its first choice asks.
                limit = None if index else self.limits.max_queue
                submitted = self.service.submit(open_[index], prompt, one, hear, limit=limit)
                taken.append(asyncio.wrap_future(submitted))
                if not index:
                    await self._taken(taken)
            await self._taken(taken)
            self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
            timing = self.metrics.timing(began)
            while open_:
                ready = [await deltas.get()]
                while not deltas.empty():
                    ready.append(deltas.get_nowait())
                for index, delta in ready:
                    if delta.finish_reason or delta.error:
                        del open_[index]
                    timing.note(index, delta)
                yield ready
        finally:
            for id in open_.values():
                self.service.cancel(id)

    async def _taken(self, submitted: Sequence[asyncio.Future[None]]) -> None:
        """Wait until all are taken.

        Raises:
            ApiError: one is not.
        """
        try:
            await asyncio.gather(*submitted)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=_RETRY_SECONDS) from error
        except ConfigError as error:
            text = str(error)
            raise invalid(text, text.split()[0]) from error


__all__ = ["Backend", "Limits", "Service"]
