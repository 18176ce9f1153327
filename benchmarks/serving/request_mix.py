"""The requests of a load, with mixed lengths, and their arrival times; both are functions of a seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from errors import ConfigError, DataError

# Token ids of random prompts: single bytes in most byte-level vocabularies, even small ones. Lower ids are
# often special tokens.
_FIRST_TOKEN, _LAST_TOKEN = 3, 255


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKind:
    """Requests of one kind.

    Attributes:
        share: Share of all requests, relative to the sum of the mix's shares.
        prompt, output: Smallest and largest number of tokens, uniformly distributed.
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
        prompt: A text or token ids.
        max_tokens: Number of tokens to ask for.
        temperature: Sampling temperature.
        seed: Seed of the sampling.
        drop_after: Number of chunks after which the client cancels the request; None reads to the end.
    """

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    drop_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMix:
    """An endless sequence of random requests.

    Attributes:
        kinds: Kinds of requests, with their lengths.
        texts: Prompts used in turn, in place of random tokens; the kinds then determine only the output.
        longest: Tokens that prompt and output may have together; longer draws are shortened.
        temperatures: Temperatures, one of which each request has.
        drops: Share of requests that the client cancels.
        seed: Seed of all draws.
    """

    kinds: Sequence[RequestKind] = CONVERSATION
    texts: Sequence[str] = ()
    longest: int = 1 << 31
    temperatures: Sequence[float] = (0.0,)
    drops: float = 0.0
    seed: int = 0

    def asks(self) -> Iterator[PlannedRequest]:
        """The requests; every call yields the same ones."""
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
    """Arrival times of a Poisson process, in seconds from the start.

    Args:
        rate: Mean number of requests per second.
        seed: Seed of the process.
        count: Largest number of requests; None has no limit but `duration`.
        duration: Seconds after which no request arrives; None has no limit but `count`.

    Raises:
        ConfigError: The rate is not positive, or neither limit is given.
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
    """A range of tokens from text: `16:64`, or `32` for exactly 32.

    Raises:
        ConfigError: The text is not a range.
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
    """Requests per second from text; None for `auto`.

    Raises:
        ConfigError: The text is neither a number above 0 nor `auto`.
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
    """The default mix of requests, with the options of `raymoe bench serve` applied.

    Raises:
        DataError: The file of prompts cannot be read, or is empty.
        ConfigError: A range is invalid, or both a file of prompts and prompt lengths are given.
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
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "does not exist" if missing else f"cannot be read: {error.strerror or error}"
        raise DataError(f"--prompts: {file} {what}; give a file with a prompt in each line") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"--prompts: {file} is not UTF-8 text (byte {error.start}); convert it, for instance with iconv"
        ) from None
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
