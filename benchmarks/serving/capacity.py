"""Measures a server's capacity: a closed loop with rising concurrency, until throughput stops growing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving.figures import Outcome, tokens_between
from benchmarks.serving.load_client import LoadClient
from benchmarks.serving.request_mix import RequestMix
from errors import ResourceError

_GROWTH = 1.05  # smallest ratio of throughput between levels that counts as growth
_FILL = 0.3  # share of a level's time at its start that is not counted, as the load is still rising


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Throughput of a server at one concurrency.

    Attributes:
        concurrency: Number of requests at the same time.
        tokens_per_second: Output tokens per second.
        requests, tokens: Number of completed requests, and of their output tokens.
    """

    concurrency: int
    tokens_per_second: float
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Capacity of a server, from several levels of concurrency."""

    levels: tuple[Level, ...]

    @property
    def best(self) -> Level:
        """The level with the highest throughput."""
        return max(self.levels, key=lambda level: level.tokens_per_second)

    @property
    def requests_per_second(self) -> float:
        """Requests per second of average length, at the best level's tokens per second."""
        length = sum(level.tokens for level in self.levels) / sum(level.requests for level in self.levels)
        return self.best.tokens_per_second / length


def level_of(outcomes: Sequence[Outcome], *, concurrency: int, began: float, seconds: float) -> Level:
    """Throughput in the time in which requests were sent, counted by the tokens that arrived in it.

    Args:
        outcomes: Outcomes of the level's requests.
        concurrency: Number of requests at the same time.
        began: When the first request was sent.
        seconds: Time in which requests were sent.

    Raises:
        ResourceError: No token arrived in that time.
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
    """Whether more concurrency may increase throughput: at least one of the last two levels did."""
    best = 0.0
    idle = 0
    for level in levels:
        idle = 0 if level.tokens_per_second > best * _GROWTH else idle + 1
        best = max(best, level.tokens_per_second)
    return idle < 2


async def measure_capacity(
    client: LoadClient, mix: RequestMix, *, seconds: float, most: int, note: Callable[[str], None]
) -> Capacity:
    """Measure levels of concurrency 1, 2, 4, … while throughput grows and no request fails.

    Args:
        client: Sends the requests.
        mix: The requests.
        seconds: Time of each level in which requests are sent.
        most: Highest concurrency.
        note: Called with a line of progress for each level.

    Raises:
        ResourceError: No request was completed.
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
