"""The state of one request in the engine: its tokens, its pages, its progress."""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from engine.params import SamplingParams

_SEEDS = 1 << 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities at one position.

    Attributes:
        token: Log probability of the token at this position.
        best: The likeliest tokens and their log probabilities, best first.
    """

    token: float
    best: list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request.

    Attributes:
        id: Name of the request.
        prompt: Tokens of the prompt, at least one.
        params: How tokens are chosen and when the request ends.
        ends: Tokens that end the request.
        output: Tokens generated, including tokens that another engine generated before.
        logprobs: Log probabilities of the tokens that this engine generated, if requested.
        prompt_logprobs: Log probabilities of the prompt from its second token on, if requested.
        drafts: Tokens that the MTP modules propose, not verified.
        computed: Number of positions whose cache entries are computed.
        pages: Pages of the cache.
        known_pages: Number of pages indexed for other requests.
        cached: Number of positions of the prompt that were found in the cache.
        begun: Whether the sequence has had pages, and so its prompt was looked up in the cache.
        finish_reason: `stop`, `length`, `abort` or `error`; None while the request runs.
        resumed: Number of output tokens that another engine generated.
        rng: Gives one random number for each token of the output.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    ends: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    drafts: list[int] = field(default_factory=list, init=False)
    computed: int = field(default=0, init=False)
    pages: list[int] = field(default_factory=list, init=False)
    known_pages: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    begun: bool = field(default=False, init=False)
    finish_reason: str | None = field(default=None, init=False)
    resumed: int = field(init=False)
    rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.resumed = len(self.output)
        seed = self.params.seed
        # Random takes the absolute value of a number, which would give 3 and -3 the same tokens.
        self.rng = random.Random(seed if seed is None else seed % _SEEDS)
        for _ in self.output:
            self.rng.random()

    def __len__(self) -> int:
        """Number of certain tokens."""
        return len(self.prompt) + len(self.output)

    @property
    def wants_prompt(self) -> bool:
        """Whether log probabilities of the prompt are computed; not again for a resumed request."""
        return self.params.prompt_logprobs and not self.resumed

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens of positions start … end - 1, certain ones and drafts."""
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
