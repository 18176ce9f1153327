"""A completion request as the engine takes it, and as much of an answer as it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.params import SamplingParams
from engine.sequence import TokenLogprobs
from errors import ConfigError
from jobs.api.api_errors import invalid
from jobs.api.backend import Backend
from jobs.api.request_bodies import CompletionRequest
from jobs.api.response_bodies import Choice

MAX_CHOICES = 1024  # of one request: the queue counts requests that wait, before it takes one


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionJob:
    """What the engine is to do.

    Attributes:
        prompts: of each choice.
        params: of each choice.
        prompt_tokens: over all prompts, each counted once.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleChoice:
    """What a client sees of a choice, or of what is new about it."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None]
    finish_reason: str | None


def completion_work(backend: Backend, request: CompletionRequest) -> CompletionJob:
    """What a request asks for.

    Raises:
        ApiError: a prompt is too long, or parameters do not go together.
    """
    asked = len(request.prompt) if _several(request.prompt) else 1
    if asked * request.n > MAX_CHOICES:
        raise invalid(f"prompt and n make {asked * request.n} choices; {MAX_CHOICES} at most", "prompt")
    prompts = _prompts(backend, request.prompt)
    params: list[SamplingParams] = []
    for prompt in prompts:
        # With echo alone nothing is to be generated, but the engine's steps always do.
        wanted = max(1, request.max_tokens) if request.max_tokens is not None else None
        room = backend.room(prompt, wanted, "max_tokens")
        for index in range(request.n):
            try:
                params.append(
                    request.sampling(
                        max_tokens=room, index=index, logprobs=request.logprobs, echo=request.echo
                    )
                )
            except ConfigError as error:
                raise invalid(str(error), str(error).split()[0]) from error
    return CompletionJob(
        prompts=[prompt for prompt in prompts for _ in range(request.n)],
        params=params,
        prompt_tokens=sum(map(len, prompts)),
    )


def shown(backend: Backend, request: CompletionRequest, choice: Choice, *, first: bool) -> VisibleChoice:
    """A choice, or what is new about it, with its prompt in front if that is asked for.

    Args:
        first: whether nothing of it has been shown yet.
    """
    text, tokens = choice.text, choice.tokens
    logprobs: list[TokenLogprobs | None] = list(choice.logprobs)
    reason = choice.finish_reason
    if request.max_tokens == 0:
        text, tokens, logprobs, reason = "", [], [], reason and "length"
    if request.echo and first:
        text = backend.tokenizer.decode(list(choice.prompt), skip_special_tokens=False) + text
        tokens = [*choice.prompt, *tokens]
        logprobs = [None, *choice.prompt_logprobs, *logprobs]
    return VisibleChoice(text=text, tokens=tokens, logprobs=logprobs, finish_reason=reason)


def _several(given: str | Sequence[Any]) -> bool:
    """Whether there are several prompts, and not the text or the tokens of one."""
    return bool(given) and not isinstance(given, str) and not isinstance(given[0], int)


def _prompts(backend: Backend, given: str | Sequence[Any]) -> list[list[int]]:
    """Every prompt as tokens; an empty one begins where a text begins."""
    items = list(given) if _several(given) else [given]
    encoded = [backend.encode(item, "prompt") if isinstance(item, str) else list(item) for item in items]
    return [tokens or [backend.end_of_text] for tokens in encoded]


__all__ = ["MAX_CHOICES", "CompletionJob", "VisibleChoice", "completion_work", "shown"]
