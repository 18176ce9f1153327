"""Response bodies: generated text, log probabilities and token usage in OpenAI's format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from engine.sequence import TokenLogprobs
from engine.service import Delta
from jobs.api.request_bodies import CompletionRequest


@dataclass(slots=True)
class Usage:
    """Token usage of a request.

    Attributes:
        prompt: Tokens of all prompts, each prompt counted once.
        completion: Tokens generated over all choices.
        cached: For each choice, positions of its prompt found in the cache.
    """

    prompt: int = 0
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The `usage` object of a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass(slots=True)
class Choice:
    """One choice of an answer, or the part of it that deltas have added."""

    prompt: Sequence[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, delta: Delta) -> None:
        """Add a delta."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """The fields that all bodies of one answer share."""

    kind: str
    model: str
    prefix: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(
        self, choices: list[dict[str, Any]], *, version: str, usage: Usage | None = None
    ) -> dict[str, Any]:
        """A whole answer, or one chunk of it.

        Args:
            version: The version of the weights that computed it.
        """
        body: dict[str, Any] = {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": version,
            "choices": choices,
        }
        if usage is not None:
            body["usage"] = usage.body()
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleChoice:
    """The part of a choice, or of its new tokens, that the client asked for."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None]
    finish_reason: str | None


def visible_part(
    tokenizer: Tokenizer, request: CompletionRequest, choice: Choice, *, first: bool
) -> VisibleChoice:
    """The visible part of a choice, or of its new tokens; after its prompt if the request asks for an echo.

    Args:
        first: Whether this is the first part of the choice.
    """
    text, tokens = choice.text, choice.tokens
    logprobs: list[TokenLogprobs | None] = list(choice.logprobs)
    reason = choice.finish_reason
    if request.max_tokens == 0:
        text, tokens, logprobs, reason = "", [], [], reason and "length"
    if request.echo and first:
        text = tokenizer.decode(list(choice.prompt), skip_special_tokens=False) + text
        tokens = [*choice.prompt, *tokens]
        logprobs = [None, *choice.prompt_logprobs, *logprobs]
    return VisibleChoice(text=text, tokens=tokens, logprobs=logprobs, finish_reason=reason)


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    offset: int = 0,
) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/completions`: parallel lists.

    Args:
        offset: Position of the first token in the text.
    """
    texts = [_text(tokenizer, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if at is None else at.token for at in logprobs],
        "top_logprobs": [
            None
            if at is None
            else {**{_text(tokenizer, t): value for t, value in at.best}, _text(tokenizer, token): at.token}
            for token, at in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """Log probabilities in the format of `/v1/chat/completions`: one object for each token."""
    return {
        "content": [
            {
                **_entry(tokenizer, token, at.token),
                "top_logprobs": [_entry(tokenizer, other, value) for other, value in at.best],
            }
            for token, at in zip(tokens, logprobs, strict=True)
        ]
    }


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    text = _text(tokenizer, token)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _text(tokenizer: Tokenizer, token: int) -> str:
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text


__all__ = [
    "Choice",
    "Envelope",
    "Usage",
    "VisibleChoice",
    "chat_logprobs",
    "completion_logprobs",
    "visible_part",
]
