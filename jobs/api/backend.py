"""A served model as the interface sees it: an engine, its texts, its limits."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from engine.params import SamplingParams
from engine.service import Delta, EngineService
from errors import ConfigError
from jobs.api.chat import ChatTemplate
from jobs.api.metrics import ServingMetrics
from jobs.api.problems import ApiError, invalid

_RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one replica takes.

    Attributes:
        max_queue: requests that may wait; one more is told to come back.
        max_prompt: tokens of a prompt; None takes what the model takes.
        max_tokens: tokens that a request may ask for; None takes what the model takes.
        api_keys: of which a request must carry one; none needed when empty.
    """

    max_queue: int = 256
    max_prompt: int | None = None
    max_tokens: int | None = None
    api_keys: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Backend:
    """One replica.

    Attributes:
        model: its name.
        longest: tokens that prompt and answer may have together.
        end_of_text: token that ends a text.
        health: says what is wrong, or None.
    """

    model: str
    service: EngineService
    tokenizer: Tokenizer
    chat: ChatTemplate
    longest: int
    end_of_text: int
    limits: Limits
    health: Callable[[], str | None]
    metrics: ServingMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    _longest_token: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))

    @property
    def version(self) -> str:
        """Of the weights in use; every answer carries that of those that computed it."""
        return self.service.version

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
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of several choices as they come, each with the index of its choice.

        Whoever stops listening stops the generation.

        Raises:
            ApiError: the queue is full, or the engine refuses the request.
        """
        _, waiting = self.service.load
        if waiting >= self.limits.max_queue:
            raise ApiError(
                429,
                f"{waiting} requests are waiting already; come back later",
                code="queue_full",
                retry_after=_RETRY_SECONDS,
            )
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        open_: dict[int, str] = {}
        began = time.perf_counter()
        try:
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                open_[index] = f"{index}-{uuid.uuid4().hex}"

                def hear(delta: Delta, index: int = index) -> None:
                    loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

                try:
                    await asyncio.wrap_future(self.service.submit(open_[index], prompt, one, hear))
                except ConfigError as error:
                    del open_[index]
                    text = str(error)
                    raise invalid(text, text.split()[0]) from error
                self.metrics.prompt_tokens.inc(len(prompt))
            timing = self.metrics.timing(began)
            while open_:
                index, delta = await deltas.get()
                if delta.finish_reason or delta.error:
                    del open_[index]
                timing.note(index, delta)
                yield index, delta
        finally:
            for id in open_.values():
                self.service.cancel(id)


__all__ = ["Backend", "Limits"]
