"""A completion request as prompts and sampling parameters for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.params import SamplingParams
from errors import ConfigError
from jobs.api.api_errors import invalid
from jobs.api.backend import Backend
from jobs.api.request_bodies import CompletionRequest

MAX_CHOICES = 1024  # of one request; the queue's limit is checked once for all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionJob:
    """Prompts and parameters of all choices of one request.

    Attributes:
        prompts: The prompt of each choice.
        params: The sampling parameters of each choice.
        prompt_tokens: Number of tokens of all prompts, each prompt counted once.
        added: How many tokens at the beginning of each choice's prompt the client has not given.
        sources: The path of each choice's prompt in the request, such as `prompt[1]`.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    prompt_tokens: int
    added: list[int]
    sources: list[str]


async def completion_job(backend: Backend, request: CompletionRequest) -> CompletionJob:
    """The prompts and parameters of a request.

    Raises:
        ApiError: A prompt is too long, or parameters contradict each other.
    """
    request = backend.completed(request)
    asked = len(request.prompt) if _several(request.prompt) else 1
    if asked * request.n > MAX_CHOICES:
        raise invalid(f"prompt and n make {asked * request.n} choices; {MAX_CHOICES} at most", "prompt")
    prompts, sources = await _prompts(backend, request.prompt), _names(request.prompt)
    params: list[SamplingParams] = []
    for prompt, source in zip(prompts, sources, strict=True):
        room = backend.room(prompt, request.max_tokens, "max_tokens", source=source)
        for index in range(request.n):
            try:
                params.append(
                    request.sampling(
                        max_tokens=room,
                        index=index,
                        logprobs=request.logprobs,
                        echo=request.echo,
                    )
                )
            except ConfigError as error:
                raise invalid(str(error), str(error).split()[0]) from error
    return CompletionJob(
        prompts=[prompt for prompt in prompts for _ in range(request.n)],
        params=params,
        prompt_tokens=sum(map(len, prompts)),
        added=[
            _added(backend, item, prompt)
            for item, prompt in zip(_items(request.prompt), prompts, strict=True)
            for _ in range(request.n)
        ],
        sources=[source for source in sources for _ in range(request.n)],
    )


def _several(given: str | Sequence[Any]) -> bool:
    """Whether a `prompt` field holds several prompts, not the text or the tokens of one."""
    return bool(given) and not isinstance(given, str) and not isinstance(given[0], int)


def _items(given: str | Sequence[Any]) -> list[Any]:
    return list(given) if _several(given) else [given]


def _added(backend: Backend, item: str | Sequence[int], prompt: Sequence[int]) -> int:
    """Number of tokens at the beginning of a prompt that the client has not given."""
    if not item:
        return len(prompt)
    return backend.opening if isinstance(item, str) else 0


def _names(given: str | Sequence[Any]) -> list[str]:
    """The path of every prompt in the request."""
    return [f"prompt[{index}]" for index in range(len(given))] if _several(given) else ["prompt"]


async def _prompts(backend: Backend, given: str | Sequence[Any]) -> list[list[int]]:
    """Every prompt as tokens; an empty prompt becomes the end-of-text token, which precedes every text."""
    items = _items(given)
    encoded = []
    for item, name in zip(items, _names(given), strict=True):
        texts = isinstance(item, str)
        tokens = await backend.encode(item, name, add_special_tokens=True) if texts else list(item)
        encoded.append(tokens or [backend.end_of_text])
        if len(items) > 1:  # other requests go on between prompts
            await asyncio.sleep(0)
    return encoded


__all__ = ["MAX_CHOICES", "CompletionJob", "completion_job"]
