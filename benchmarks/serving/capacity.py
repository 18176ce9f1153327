"""What a server can do at most: a closed loop at rising concurrency, until throughput grows no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving.figures import Outcome, tokens_between
from benchmarks.serving.load_client import LoadClient
from benchmarks.serving.request_mix import RequestMix
from errors import ResourceError

_GROWTH = 1.05  # less than this from one level to the next is none
_FILL = 0.3  # share of a level's time in which requests and cache fill up, and nothing is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What a server did at one concurrency.

    Attributes:
        tokens_per_second: of output.
        requests, tokens: that were answered, and their output's length together.
    """

    concurrency: int
    tokens_per_second: float
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What several levels say together."""

    levels: tuple[Level, ...]

    @property
    def best(self) -> Level:
        """The level with the highest throughput."""
        return max(self.levels, key=lambda level: level.tokens_per_second)

    @property
    def requests_per_second(self) -> float:
        """Of average length over all levels, at the best level's tokens per second."""
        length = sum(level.tokens for level in self.levels) / sum(level.requests for level in self.levels)
        return self.best.tokens_per_second / length


def level_of(outcomes: Sequence[Outcome], *, concurrency: int, began: float, seconds: float) -> Level:
    """Throughput while requests were begun, those under way counting by the tokens that had come.

    Args:
        began: when the level's first request was sent.
        seconds: during which requests were begun.

    Raises:
        ResourceError: no token came in that time.
    """
    good = [outcome for outcome in outcomes if outcome.failure is None]
    first, last = began + _FILL * seconds, began + seconds
    speed = tokens_between(good, first, last) / (last - first)
    if not speed:
        failures = [f"{o.failure} ({o.text})" for o in outcomes if o.failure]
        why = failures[0] if failures else f"no token within {seconds:g} s; raise --probe-seconds"
        raise ResourceError(f"the capacity cannot be measured: {why}")
    return Level(
        concurrency=concurrency,
        tokens_per_second=speed,
        requests=len(good),
        tokens=sum(outcome.output_tokens for outcome in good),
    )


def grows(levels: Sequence[Level]) -> bool:
    """Whether more concurrency may bring more: the last two levels were not both without a gain."""
    best = 0.0
    idle = 0
    for level in levels:
        idle = 0 if level.tokens_per_second > best * _GROWTH else idle + 1
        best = max(best, level.tokens_per_second)
    return idle < 2


async def measure_capacity(
    client: LoadClient, mix: RequestMix, *, seconds: float, most: int, note: Callable[[str], None]
) -> Capacity:
    """Levels of concurrency 1, 2, 4, … as far as throughput grows, the server refuses nothing, or `most`.

    Args:
        seconds: of each level, after which its requests are let end.

    Raises:
        ResourceError: no request went well.
    """
    asks = mix.asks()
    levels: list[Level] = []
    refused = False
    concurrency = 1
    while concurrency <= most and grows(levels) and not refused:
        best = f", {levels[-1].tokens_per_second:,.0f} tok/s before" if levels else ""
        note(f"capacity: {concurrency} at a time{best}")
        began = client.clock()
        outcomes = await client.closed_loop(
            asks, concurrency=concurrency, seconds=seconds, note=lambda _: None
        )
        refused = any(outcome.failure is not None for outcome in outcomes)
        if not (refused and levels):
            levels.append(level_of(outcomes, concurrency=concurrency, began=began, seconds=seconds))
        concurrency *= 2
    return Capacity(levels=tuple(levels))


__all__ = ["Capacity", "Level", "grows", "level_of", "measure_capacity"]
