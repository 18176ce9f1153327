"""Response bodies: generated text and token usage in OpenAI's format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.delta import Delta
from engine.sequence import TokenLogprobs
from engine.text import Detokenizer
from jobs.api.logprob_bodies import TextOffsets


@dataclass(slots=True, kw_only=True)
class Usage:
    """Token usage of a request, the same however its answer is sent.

    Attributes:
        prompt: Tokens of all prompts, each prompt counted once.
        choices: Number of choices of each prompt; those of one prompt are neighbours.
        completion: Tokens generated over all choices.
    """

    prompt: int
    choices: int = 1
    completion: int = 0
    _cached: dict[int, int] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        """Positions of all prompts that were found in the cache, each prompt counted once.

        What counts is the first choice of a prompt: the others find what that one has computed.
        """
        return sum(self._cached.values())

    def note(self, index: int, delta: Delta) -> None:
        """Count a delta of choice `index`."""
        self.completion += len(delta.tokens)
        if index % self.choices == 0:
            self._cached[index] = delta.cached

    def body(self) -> dict[str, Any]:
        """The `usage` object of a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Choice:
    """One choice of an answer, or the part of it that deltas have added."""

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
class CompletionPart:
    """The part of a choice that new tokens add, as the client sees it.

    Attributes:
        text: Text, after the prompt's in the first part of an echo.
        tokens: Tokens, after the prompt's in the first part of an echo.
        offsets: Positions of the tokens in the choice's whole text, if log probabilities were asked for.
        logprobs: Log probabilities of the tokens, if they were asked for; None for the first of a prompt.
        finish_reason: Why the choice ended, in its last part.
    """

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None]
    finish_reason: str | None


class CompletionView:
    """What the client of a completion sees of one choice, part by part; a whole answer is one part.

    Args:
        detokenizer: Decodes the prompt, and the tokens for their positions.
        prompt: Tokens of the prompt.
        added: Number of tokens at its beginning that the client's text does not have (BOS).
        echo: Whether the prompt comes first.
        logprobs: Whether the client asked for log probabilities.
    """

    def __init__(
        self, detokenizer: Detokenizer, prompt: Sequence[int], *, added: int = 0, echo: bool, logprobs: bool
    ) -> None:
        self._detokenizer, self._added, self._logprobs = detokenizer, added, logprobs
        self._prompt = prompt if echo else None  # until it has been shown
        self._offsets = TextOffsets(detokenizer)

    def part(self, news: Choice) -> CompletionPart:
        """The next part.

        Raises:
            DataError: The tokenizer cannot decode the prompt.
        """
        text, tokens, logprobs = news.text, news.tokens, [*news.logprobs]
        offsets: list[int] = []
        before: list[TokenLogprobs | None] = []
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            given = prompt[self._added :]
            said = self._detokenizer.decode(given, special=True)
            if self._logprobs:
                offsets = [0] * (len(prompt) - len(given))
                offsets += TextOffsets(self._detokenizer, special=True).take(given)
                before = [None, *news.prompt_logprobs]
            self._offsets = TextOffsets(self._detokenizer, start=len(said))
            text, tokens = said + text, [*prompt, *tokens]
        if self._logprobs:
            offsets += self._offsets.take(news.tokens)
        return CompletionPart(
            text=text,
            tokens=tokens,
            offsets=offsets,
            logprobs=[*before, *logprobs],
            finish_reason=news.finish_reason,
        )


__all__ = ["Choice", "CompletionPart", "CompletionView", "Envelope", "Usage"]
