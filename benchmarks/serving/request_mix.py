"""What a load generator asks for, and when: requests of mixed lengths, and the moments of their arrival.

All is drawn from seeds: the same numbers give the same load.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from errors import ConfigError, DataError

# Tokens of random prompts: bytes or so in every byte-level vocabulary, however small; the ids below are
# where vocabularies keep the ends of texts.
_FIRST_TOKEN, _LAST_TOKEN = 3, 255


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKind:
    """Requests of one kind.

    Attributes:
        share: of all requests; the shares of a mix are taken relative to their sum.
        prompt, output: fewest and most tokens, every number between being as likely.
    """

    share: float
    prompt: tuple[int, int]
    output: tuple[int, int]


CONVERSATION: tuple[RequestKind, ...] = (
    RequestKind(share=0.6, prompt=(16, 128), output=(16, 64)),
    RequestKind(share=0.3, prompt=(16, 64), output=(64, 256)),
    RequestKind(share=0.1, prompt=(256, 768), output=(8, 32)),
)
"""The default mix: short questions, long answers, and long texts with a short answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request.

    Attributes:
        prompt: a text or token ids.
        seed: of its sampling.
        drop_after: chunks after which the client hangs up; None reads to the end.
    """

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    drop_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMix:
    """An endless supply of requests.

    Attributes:
        kinds: of requests, with their lengths.
        texts: prompts to take turns in place of random tokens; the kinds then give the outputs' lengths.
        longest: tokens that prompt and output may have together; longer draws are cut.
        temperatures: each request has one of them.
        drops: share of requests whose client hangs up in the middle.
        seed: of all draws.
    """

    kinds: Sequence[RequestKind] = CONVERSATION
    texts: Sequence[str] = ()
    longest: int = 1 << 31
    temperatures: Sequence[float] = (0.0,)
    drops: float = 0.0
    seed: int = 0

    def asks(self) -> Iterator[PlannedRequest]:
        """The requests, the same ones at every call."""
        source = random.Random(f"asks {self.seed}")
        texts = itertools.cycle(self.texts)
        weights = [kind.share for kind in self.kinds]
        while True:
            kind = source.choices(self.kinds, weights)[0]
            n_output = min(source.randint(*kind.output), max(1, self.longest // 2))
            n_prompt = min(source.randint(*kind.prompt), max(1, self.longest - n_output))
            tokens = tuple(source.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(n_prompt))
            dropped = source.random() < self.drops
            yield PlannedRequest(
                prompt=next(texts) if self.texts else tokens,
                max_tokens=n_output,
                temperature=source.choice(self.temperatures),
                seed=source.getrandbits(31),
                drop_after=source.randrange(1, max(2, n_output)) if dropped else None,
            )


def arrivals(rate: float, *, seed: int, count: int | None, duration: float | None) -> Iterator[float]:
    """Moments at which requests arrive, in seconds from the start: a Poisson process.

    Args:
        rate: requests per second, on average.
        count: how many; None for as many as come within `duration`.
        duration: seconds after which none comes; None for no end but `count`.

    Raises:
        ConfigError: the rate is not positive, or neither end is given.
    """
    if not rate > 0:
        raise ConfigError(f"--rate is {rate:g}; give requests per second above 0, or auto")
    if count is None and duration is None:
        raise ConfigError("neither --requests nor --duration is given; give one of them")
    return _poisson(rate, random.Random(f"arrivals {seed}"), count, duration)


def _poisson(
    rate: float, source: random.Random, count: int | None, duration: float | None
) -> Iterator[float]:
    at = 0.0
    for number in itertools.count():
        at += source.expovariate(rate)
        if (count is not None and number >= count) or (duration is not None and at >= duration):
            return
        yield at


def read_span(text: str, option: str) -> tuple[int, int]:
    """`16:64`, or `32` for always 32.

    Raises:
        ConfigError: it is neither, or not in order.
    """
    first, _, last = text.partition(":")
    try:
        span = int(first), int(last or first)
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1]:
        raise ConfigError(f"{option} is {text!r}; give tokens as FEWEST:MOST, such as 16:64, or one number")
    return span


def rate_of(text: str) -> float | None:
    """Requests per second; None for `auto`.

    Raises:
        ConfigError: neither a number above 0 nor `auto`.
    """
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(f"--rate is {text!r}; give requests per second above 0, or auto")
    return rate


def mix_of(
    prompts: Path | None,
    *,
    prompt_tokens: str | None,
    output_tokens: str | None,
    temperature: float,
    drops: float,
    seed: int,
) -> RequestMix:
    """The mix that a user asks for: the default one, with what is given in place of its own.

    Raises:
        DataError: the file of prompts cannot be read, or holds none.
        ConfigError: a length that is none, or lengths of prompts beside a file of them.
    """
    kinds = CONVERSATION
    if prompts is not None and prompt_tokens is not None:
        raise ConfigError("--prompt-tokens is the length of random prompts; leave it or --prompts out")
    if prompt_tokens is not None:
        span = read_span(prompt_tokens, "--prompt-tokens")
        kinds = tuple(replace(kind, prompt=span) for kind in kinds)
    if output_tokens is not None:
        span = read_span(output_tokens, "--output-tokens")
        kinds = tuple(replace(kind, output=span) for kind in kinds)
    return RequestMix(
        kinds=kinds,
        texts=() if prompts is None else _texts(prompts),
        temperatures=(temperature,),
        drops=drops,
        seed=seed,
    )


def _texts(file: Path) -> tuple[str, ...]:
    try:
        texts = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {file} cannot be read as UTF-8 text: {error}") from None
    if not texts:
        raise DataError(f"--prompts: {file} holds no line of text")
    return texts


__all__ = [
    "CONVERSATION",
    "PlannedRequest",
    "RequestKind",
    "RequestMix",
    "arrivals",
    "mix_of",
    "rate_of",
    "read_span",
]
