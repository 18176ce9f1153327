"""Losses of a server's processes under streams: what is asked for, and waiting until all is there again."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil

from actors.rpc.admin_client import AdminClient
from support.commands.serve import PROMPT, ServeProcess
from support.commands.streams import TRUNK, StreamLoad, Told, actors, disturbed
from support.waiting import wait_until

IN_A_ROW = 30
"""Losses in a row in the tests that lose the same thing again and again."""

_STREAMS, _TOKENS = 12, 160  # of a `LossSeries`


def request(index: int, count: int) -> dict[str, Any]:
    """A completion request: greedy, seeded, with penalties or with log probabilities, by its index."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": index, "logprobs": 2},
        {"temperature": 0.8, "seed": index, "presence_penalty": 0.5, "top_p": 0.95},
        {"temperature": 0.0, "logprobs": 0, "echo": True, "frequency_penalty": 0.3},
    ]
    return {
        "model": "tiny",
        "prompt": PROMPT[: 3 + index % 11],
        "max_tokens": count + index,
        "extra_body": {"ignore_eos": True},
        **kinds[index % len(kinds)],
    }


def trunks(server: ServeProcess) -> list[psutil.Process]:
    """The processes of the server's trunk replicas."""
    return actors(server, TRUNK)


def answering_trunks(server: ServeProcess) -> int:
    """Number of trunk replicas that answer."""
    return len(_metric(server, "num_requests_running"))


def expert_hosts(server: ServeProcess) -> float | None:
    """Number of expert hosts that serve and answer; None while the pool does not say."""
    return next(iter(_metric(server, "expert_hosts")), None)


def _metric(server: ServeProcess, name: str) -> list[float]:
    """The values of a metric, whatever its labels."""
    lines = server.metrics()
    return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"raymoe_{name}{{")]


def wait_for_trunks(server: ServeProcess) -> None:
    """Wait until two trunk replicas answer."""
    wait_until(lambda: answering_trunks(server) >= 2, seconds=120.0, every=0.2)


def wait_for_hosts(admin: AdminClient, hosts: int, *, replicas: int = 2) -> dict[str, Any]:
    """Wait until so many hosts serve and every expert has its replicas; return the status."""

    def status() -> dict[str, Any]:
        found = admin.status()
        serve = [host["state"] for host in found["hosts"]] == ["serving"] * hosts
        return found if serve and found["replicas_min"] >= min(replicas, hosts) else {}

    return wait_until(status, seconds=120.0, every=0.1, what=admin.status)


class SaidLines:
    """The lines that a server's command has written on stderr since this was made."""

    def __init__(self, server: ServeProcess) -> None:
        self._log = server.log
        self._before = len(self.all())

    def all(self) -> list[str]:
        """Every complete line of the command."""
        return [line for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def find(self, pattern: str) -> list[re.Match[str]]:
        """The new lines that a regular expression matches anywhere."""
        return [found for line in self.all()[self._before :] if (found := re.search(pattern, line))]

    def wait(self, pattern: str) -> re.Match[str]:
        """The first new line that a regular expression matches, as soon as there is one."""
        return wait_until(lambda: self.find(pattern), seconds=120.0, every=0.1, what=self._log.read_text)[0]


def _hit(
    candidates: Callable[[], list[psutil.Process]],
    source: random.Random,
    how: signal.Signals,
    hit: list[psutil.Process],
) -> None:
    """Send a signal to one of the processes that there are now, and add that one to `hit`.

    A process that starved for a while, so that it was given up and replaced, may end just now: then another
    one is taken.
    """
    while not hit:
        one = source.choice(candidates())
        with suppress(psutil.NoSuchProcess):
            one.send_signal(how)
            hit.append(one)


@dataclass(slots=True)
class LossSeries:
    """Streams of a server of three hosts and two trunk replicas, which loses one process after the other."""

    server: ServeProcess
    admin: AdminClient
    undisturbed: list[Told] = field(init=False)

    def __post_init__(self) -> None:
        wait_for_trunks(self.server)
        self.undisturbed = asyncio.run(self._load().run())
        assert all(reason == "length" for *_, reason in self.undisturbed)

    def lose(
        self, candidates: Callable[[], list[psutil.Process]], how: signal.Signals, *, kill: bool = False
    ) -> str:
        """Send a signal to one of these processes again and again; return the longest gaps as text.

        Args:
            candidates: The processes of which one is lost.
            how: The signal.
            kill: End a stopped process in the end; otherwise the server has to.
        """
        gaps = []
        for seed in range(IN_A_ROW):
            wait_for_trunks(self.server)
            wait_for_hosts(self.admin, 3)
            source = random.Random(seed)
            at = source.randrange(_STREAMS, _STREAMS * _TOKENS // 2)
            load, hit = self._load(), list[psutil.Process]()
            asyncio.run(disturbed(load, at, partial(_hit, candidates, source, how, hit)))
            assert load.told == self.undisturbed
            gaps.append(load.gap)
            (lost,) = hit
            if kill:
                with suppress(psutil.NoSuchProcess):
                    lost.kill()
            lost.wait(60)
        return f"{IN_A_ROW} times: longest gaps {', '.join(f'{gap:.2f}' for gap in sorted(gaps))} s"

    def _load(self) -> StreamLoad:
        return StreamLoad(self.server, [request(index, _TOKENS) for index in range(_STREAMS)])


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that keeps one core busy within the context."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
            yield
        finally:
            process.kill()


__all__ = [
    "IN_A_ROW",
    "LossSeries",
    "SaidLines",
    "answering_trunks",
    "busy_core",
    "request",
    "trunks",
    "wait_for_hosts",
    "wait_for_trunks",
]
