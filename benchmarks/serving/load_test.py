"""`raymoe bench serve`: measures a server under open-loop load.

Requests arrive in a Poisson process, whether or not earlier ones have ended, like those of independent users.
So the latencies of an overloaded server include all the waiting that it causes.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.serving.capacity import measure_capacity
from benchmarks.serving.figures import Outcome, figures
from benchmarks.serving.load_client import LoadClient, connected
from benchmarks.serving.measured_server import served
from benchmarks.serving.request_mix import RequestMix, arrivals
from errors import ResourceError

Show = Callable[[str], None]
"""Called with a line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load for a server.

    Attributes:
        mix: The requests.
        rate: Requests per second; None measures the capacity first and offers `share` of it.
        share: Share of the capacity.
        requests, duration: Number of requests and seconds after which to stop, whichever comes first.
        probe_seconds, most_concurrency: Time of each level, and highest concurrency, in measuring the
            capacity.
        ignore_eos: Have every request generate its full number of tokens.
        timeout: Seconds after which a request fails.
        api_key: API key sent with every request.
    """

    mix: RequestMix
    rate: float | None = None
    share: float = 0.8
    requests: int | None = None
    duration: float | None = 30.0
    probe_seconds: float = 10.0
    most_concurrency: int = 256
    ignore_eos: bool = True
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)


def bench_serve(
    url: str | None,
    load: Load,
    *,
    checkpoint: Path | None = None,
    options: Sequence[str] = (),
    show: Show,
) -> dict[str, Any]:
    """Measure a server under load; by default one that is started for the measurement.

    Args:
        url: URL of a running server; None starts one.
        load: The load.
        checkpoint: Checkpoint for the server that is started; None takes bench-20m with random weights.
        options: Options of `raymoe serve` for the server that is started.
        show: Called with lines of progress.

    Returns:
        The `figures`, with `request_rate` (offered), `seed`, `model`, `url`, and `capacity` if it was
        measured.

    Raises:
        RaymoeError: There is no server, or no request was answered.
    """
    with ExitStack() as stack:
        if url is None:
            # SIGTERM ends this command like Ctrl-C, so that the server is stopped.
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, before)
            show("starting a server")
            url = stack.enter_context(served(checkpoint, options)).url
        return asyncio.run(offer(url, load, show))


async def offer(url: str, load: Load, show: Show) -> dict[str, Any]:
    """Measure a running server under load.

    Raises:
        RaymoeError: It cannot be reached, or answers no request.
    """
    async with connected(
        url, api_key=load.api_key, ignore_eos=load.ignore_eos, timeout=load.timeout
    ) as client:
        mix = load.mix if client.longest is None else replace(load.mix, longest=client.longest)
        first = await client.ask(next(replace(mix, drops=0.0).asks()), due=client.clock())
        if first.failure is not None:
            raise ResourceError(f"{url} does not answer a request: {first.failure}: {first.text}")
        rate, measured = load.rate, {}
        if rate is None:
            capacity = await measure_capacity(
                client, mix, seconds=load.probe_seconds, most=load.most_concurrency, note=show
            )
            rate = load.share * capacity.requests_per_second
            measured = {
                "capacity": {
                    "request_throughput": capacity.requests_per_second,
                    "output_throughput": capacity.best.tokens_per_second,
                    "concurrency": capacity.best.concurrency,
                    "levels": [asdict(level) for level in capacity.levels],
                },
                "load": load.share,
            }
        found = await _open_loop(client, load, mix, rate, show)
    return {"url": url, "model": client.model, "seed": mix.seed, "request_rate": rate, **measured, **found}


async def _open_loop(
    client: LoadClient, load: Load, mix: RequestMix, rate: float, show: Show
) -> dict[str, Any]:
    # Not the requests that measured the capacity, because their prompts are in the server's cache.
    asks = replace(mix, seed=mix.seed + 1).asks()
    due = arrivals(rate, seed=mix.seed, count=load.requests, duration=load.duration)
    began = client.clock()
    ended = failed = tokens = 0

    def note(outcome: Outcome) -> None:
        nonlocal ended, failed, tokens
        ended += 1
        failed += outcome.failure is not None
        tokens += outcome.output_tokens
        seconds = client.clock() - began
        show(
            f"{rate:.3g} requests/s for {seconds:.0f} s: {ended} ended, {failed} failed, "
            f"{tokens / seconds:,.0f} tok/s"
        )

    outcomes = await client.open_loop(asks, due, note)
    if not outcomes:
        raise ResourceError("no request was due in that time; raise --rate or --duration")
    if all(outcome.failure is not None for outcome in outcomes):
        one = outcomes[0]
        raise ResourceError(f"all of {len(outcomes)} requests failed, with {one.failure}: {one.text}")
    return figures(outcomes, began=began)


__all__ = ["Load", "Show", "bench_serve", "offer"]
