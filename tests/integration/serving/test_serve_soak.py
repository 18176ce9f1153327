"""A server under load for minutes: no request fails, no memory grows, nothing stays in use. `make soak`."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import psutil
import pytest

from benchmarks.serving.capacity import measure_capacity
from benchmarks.serving.figures import Outcome, figures
from benchmarks.serving.load_client import connected
from benchmarks.serving.measured_server import MeasuredServer, served
from benchmarks.serving.request_mix import RequestMix, arrivals

SECONDS = float(os.environ.get("RAYMOE_SOAK_SECONDS", "600"))
pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS + 900)]
LOAD = 0.8
MIB = 1 << 20
# Half of the requests are sampled, and one in ten clients hangs up in the middle.
MIX = RequestMix(temperatures=(0.0, 0.9), drops=0.1, seed=1)
# Small enough for the load to fill it many times, so that pages are reused and prefixes evicted.
OPTIONS = ("--set=cluster.expert_hosts=2", "--set=serving.cache_tokens=8192")


def members(target: MeasuredServer) -> dict[str, psutil.Process]:
    """Processes of hosts, replicas and interface, by role and id."""
    assert target.process is not None
    found = {}
    for child in target.process.children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        for kind, name in (
            ("ExpertHost", "host"),
            ("ServeReplica:raymoe:trunk", "replica"),
            ("ServeReplica:raymoe:api", "interface"),
        ):
            if kind in title:
                found[f"{name}-{child.pid}"] = child
    return found


def gauges(target: MeasuredServer) -> dict[str, float]:
    """Gauges of requests and pages in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    with urllib.request.urlopen(f"{target.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(tuple(f"raymoe_{name}{{" for name in names))
    }
    assert found
    return found


@asynccontextmanager
async def sampled(
    processes: dict[str, psutil.Process], moments: Sequence[float]
) -> AsyncIterator[list[dict[str, int]]]:
    """Resident memory of each process, at moments counted from now."""
    found: list[dict[str, int]] = []

    async def sample() -> None:
        began = time.monotonic()
        for at in moments:
            await asyncio.sleep(began + at - time.monotonic())
            found.append({name: one.memory_info().rss for name, one in processes.items()})

    task = asyncio.create_task(sample())
    try:
        yield found
        await task
    finally:
        task.cancel()


async def run(target: MeasuredServer) -> tuple[float, float, list[Outcome], list[dict[str, int]]]:
    """Offer the load; return the rate, its start, the outcomes, and memory after a tenth and at the end."""
    async with connected(target.url) as client:
        assert client.longest is not None
        mix = replace(MIX, longest=client.longest)
        capacity = await measure_capacity(client, mix, seconds=10.0, most=128, note=print)
        rate = LOAD * capacity.requests_per_second
        due = arrivals(rate, seed=mix.seed, count=None, duration=SECONDS)
        began = client.clock()
        async with sampled(members(target), (SECONDS / 10, SECONDS)) as memory:
            outcomes = await client.open_loop(replace(mix, seed=2).asks(), due, lambda _: None)
        return rate, began, outcomes, memory


def test_ten_minutes_at_four_fifths_of_the_capacity() -> None:
    with served(None, OPTIONS) as target:
        assert len(members(target)) == 4
        rate, began, outcomes, (early, late) = asyncio.run(run(target))
        deadline = time.monotonic() + 60
        while any(gauges(target).values()):
            assert time.monotonic() < deadline, gauges(target)
        assert members(target).keys() == early.keys()
    found = figures(outcomes, began=began)
    print(f"{SECONDS:.0f} s at {rate:.2f} requests/s ({LOAD:.0%} of the capacity)")
    for name, value in found.items():
        print(f"  {name}: {value:.5g}" if isinstance(value, float) else f"  {name}: {value}")
    for name in early:
        print(
            f"  {name}: {early[name] / MIB:.0f} MiB, {(late[name] - early[name]) / MIB:+.1f} MiB at the end"
        )
    assert found["failed"] == 0, found["errors"]
    assert found["dropped"] > 0
    assert found["completed"] + found["dropped"] == len(outcomes)
    assert len(outcomes) > 0.8 * rate * SECONDS
    for name in early:
        assert (late[name] - early[name]) / MIB < 32
    assert not [name for name in os.listdir("/dev/shm") if "raymoe" in name]
