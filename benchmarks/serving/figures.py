"""Outcomes of requests, and the figures computed from them, with the names of vLLM's `bench serve`.

Times are seconds of one monotonic clock; latencies in the figures are milliseconds.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Times and result of one request.

    Attributes:
        due: When the schedule wanted it sent.
        sent: When it was sent.
        chunks: When each chunk with tokens arrived; a chunk may have several tokens.
        ended: When it ended.
        prompt_tokens, output_tokens: Counted by the server; for a cancelled request, the number of chunks.
        dropped: Whether the client cancelled it on purpose.
        failure: Kind of its failure; None if it did not fail.
        text: Text of the failure.
    """

    due: float
    sent: float = math.nan
    chunks: list[float] = field(default_factory=list)
    ended: float = math.nan
    prompt_tokens: int = 0
    output_tokens: int = 0
    dropped: bool = False
    failure: str | None = None
    text: str = ""

    @property
    def completed(self) -> bool:
        """Whether it was answered completely."""
        return self.failure is None and not self.dropped


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile of values in any order, linearly interpolated; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def tokens_between(outcomes: Sequence[Outcome], begin: float, end: float) -> float:
    """Tokens that arrived within [begin, end); a request's tokens are spread evenly over its chunks."""
    total = 0.0
    for outcome in outcomes:
        if outcome.chunks:
            came = bisect.bisect_left(outcome.chunks, end) - bisect.bisect_left(outcome.chunks, begin)
            total += outcome.output_tokens * came / len(outcome.chunks)
    return total


def concurrency(outcomes: Sequence[Outcome]) -> tuple[int, float]:
    """Largest and mean number of requests that ran at the same time."""
    if not outcomes:
        return 0, 0.0
    edges = sorted([(o.sent, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes])
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    span = edges[-1][0] - edges[0][0]
    return most, sum(o.ended - o.sent for o in outcomes) / span if span > 0 else float(most)


def figures(outcomes: Sequence[Outcome], *, began: float) -> dict[str, Any]:
    """Counts, throughput, concurrency, latencies, and the client's own delay.

    `ttft` (time to first token) and `e2el` (end-to-end latency) are measured from the scheduled arrival, so
    that they include the delay of an overloaded client or server. `tpot` is a request's time per output token
    after the first; `itl` (inter-token latency) is the time between two chunks. `slip` is the delay with
    which the client sent a request. Latencies are those of completed requests.
    """
    good = [outcome for outcome in outcomes if outcome.completed]
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    duration = max((outcome.ended for outcome in outcomes), default=began) - began
    n_input = sum(outcome.prompt_tokens for outcome in good)
    n_output = sum(outcome.output_tokens for outcome in good)
    most, mean = concurrency(outcomes)
    latencies: dict[str, list[float]] = {
        "ttft": [outcome.chunks[0] - outcome.due for outcome in good if outcome.chunks],
        "tpot": [
            (outcome.chunks[-1] - outcome.chunks[0]) / (outcome.output_tokens - 1)
            for outcome in good
            if outcome.chunks and outcome.output_tokens > 1
        ],
        "itl": [after - before for outcome in good for before, after in pairwise(outcome.chunks)],
        "e2el": [outcome.ended - outcome.due for outcome in good],
        "slip": [outcome.sent - outcome.due for outcome in outcomes],
    }

    def per_second(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    result: dict[str, Any] = {
        "completed": len(good),
        "failed": failures.total(),
        "dropped": sum(outcome.dropped for outcome in outcomes),
        "errors": dict(sorted(failures.items())),
        "duration": duration,
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
        "request_throughput": per_second(len(good)),
        "output_throughput": per_second(n_output),
        "total_token_throughput": per_second(n_input + n_output),
        "max_concurrent_requests": most,
        "mean_concurrent_requests": mean,
    }
    for name, values in latencies.items():
        if name != "slip":
            result[f"mean_{name}_ms"] = 1000 * sum(values) / len(values) if values else math.nan
        for percent in PERCENTILES:
            result[f"p{percent}_{name}_ms"] = 1000 * percentile(values, percent)
    result["max_slip_ms"] = 1000 * max(latencies["slip"], default=math.nan)
    return result


__all__ = ["PERCENTILES", "Outcome", "concurrency", "figures", "percentile", "tokens_between"]
