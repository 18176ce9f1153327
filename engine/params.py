"""Sampling parameters of a request, with the names of the OpenAI and vLLM interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from errors import ConfigError

MAX_LOGPROBS = 20
MAX_STOPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when the request ends.

    Attributes:
        max_tokens: Number of tokens to generate, at most; 0 computes the prompt alone.
        min_tokens: Number of tokens before which stop strings and end tokens are ignored.
        temperature: Divides logits; 0 is greedy.
        top_p: Choose from the smallest set of likeliest tokens with this total probability; 0 is greedy.
        top_k: Choose from this number of likeliest tokens; 0 takes all.
        min_p: Choose from tokens with at least this probability relative to the likeliest.
        seed: Seed of the request's random numbers, of either sign; None draws one.
        repetition_penalty: Divides positive and multiplies negative logits of tokens of prompt and output.
        presence_penalty: Subtracted from the logits of tokens of the output.
        frequency_penalty: Subtracted from the logits of tokens of the output, times their number.
        logit_bias: Token id -> value added to its logit.
        stop: Strings that end the text and do not belong to it.
        stop_token_ids: Tokens that end the text and do not belong to it.
        ignore_eos: Whether generation continues after an end-of-text token.
        logprobs: Number of likeliest alternatives reported with each token; None reports no log
            probabilities.
        prompt_logprobs: Whether log probabilities of the prompt's tokens are reported, too (`echo`).

    Raises:
        ConfigError: a value out of its range, naming the parameter.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ConfigError(f"{name} ({value}) must lie between {low:g} and {high:g}")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty ({self.repetition_penalty}) must be greater than 0")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs ({self.logprobs}) must lie between 0 and {MAX_LOGPROBS}")
        if len(self.stop) > MAX_STOPS:
            raise ConfigError(f"stop has {len(self.stop)} strings; {MAX_STOPS} at most")
        if not all(self.stop):
            raise ConfigError("stop has an empty string, which every text begins with; leave it out")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias of token {token} ({bias}) must lie between -100 and 100")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen."""
        return self.temperature < _GREEDY_BELOW or self.top_p == 0.0

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before the choice, by penalties, biases or `min_tokens`."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


def check_tokens(
    vocabulary: int, prompt: Sequence[int], params: SamplingParams, output: Sequence[int]
) -> None:
    """Check that all tokens of a request are below the size of the vocabulary.

    Raises:
        ConfigError: a token is unknown; the message begins with its path, such as `prompt[3]`.
    """
    for name, tokens in (
        ("prompt", prompt),
        ("output", output),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for at, token in enumerate(tokens):
            if not 0 <= token < vocabulary:
                raise ConfigError(f"{name}[{at}] is token {token}; ids go from 0 to {vocabulary - 1}")
    for token in params.logit_bias:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"logit_bias.{token} is no token; ids go from 0 to {vocabulary - 1}")


_GREEDY_BELOW = 1e-5  # dividing by less would overflow
_RANGES = (
    ("max_tokens", 0, float("inf")),
    ("min_tokens", 0, float("inf")),
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, float("inf")),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)

__all__ = ["MAX_LOGPROBS", "MAX_STOPS", "SamplingParams", "check_tokens"]
