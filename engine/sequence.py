"""One request on its way through the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from engine.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities at one position.

    Attributes:
        token: log probability of the token that is there.
        best: the likeliest tokens and theirs, best first.
    """

    token: float
    best: list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request.

    Attributes:
        id: of the request.
        prompt: its tokens, one at least.
        params: how to go on.
        ends: tokens that end it.
        output: tokens generated; those that it comes with, another engine has.
        logprobs: of the output that this engine generates, when asked for.
        prompt_logprobs: of the prompt from its second token on, when asked for and not told before.
        drafts: tokens that the MTP modules propose to follow, not verified.
        computed: positions whose entries the pages hold.
        pages: of the cache.
        known_pages: pages that others can find.
        cached: positions of the prompt that were found in the cache.
        finish_reason: `stop`, `length` or `abort`; None while it goes on.
        resumed: tokens of the output that it came with.
        rng: the source of one number for each token of the output.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    ends: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    known_pages: int = 0
    cached: int = 0
    finish_reason: str | None = None
    resumed: int = field(init=False)
    rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.resumed = len(self.output)
        self.rng = random.Random(self.params.seed)
        for _ in self.output:
            self.rng.random()

    def __len__(self) -> int:
        """Tokens that are certain."""
        return len(self.prompt) + len(self.output)

    @property
    def wants_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are to be told: with the first token, so not again."""
        return self.params.prompt_logprobs and not self.resumed

    def tokens(self, start: int, end: int) -> list[int]:
        """Certain tokens and drafts of positions start … end - 1."""
        n_prompt = len(self.prompt)
        if end <= n_prompt:
            return self.prompt[start:end]
        tail = self.output + self.drafts
        if start >= n_prompt:
            return tail[start - n_prompt : end - n_prompt]
        return self.prompt[start:] + tail[: end - n_prompt]

    @property
    def all_tokens(self) -> Tokens[int]:
        """Prompt and output."""
        return self.prompt + self.output if self.output else self.prompt


__all__ = ["Sequence", "TokenLogprobs"]
