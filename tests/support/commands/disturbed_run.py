"""`raymoe train` that a test disturbs, and the pauses that the disturbances cost."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from actors.rpc.admin_client import AdminClient
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from support.commands.train import STEPS, assert_gone, family, losses, start
from support.waiting import wait_until

T = TypeVar("T")
HOST, WORKER, COORDINATOR = "_ExpertHostProcess", "RayTrainWorker", "_CoordinatorProcess"

SETTINGS = {
    "training__steps": STEPS,
    "checkpoint__interval": 0,
    "cluster__expert_hosts": 3,
    "cluster__snapshot_interval": 5,
    "cluster__dead_after": 2.0,
}


class DisturbedRun:
    """A training run that a test disturbs.

    Attributes:
        pauses: Seconds from each disturbance to a step that the run made afterwards.
    """

    def __init__(self, corpus: Path, output: Path, *options: str, **changed: object) -> None:
        self.output = output
        self.process = start(corpus, output, *options, **{**SETTINGS, **changed})
        self.pauses: list[float] = []
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def said(self) -> list[str]:
        """The lines on stderr."""
        return "".join(self._said).splitlines()

    def admin(self) -> AdminClient:
        """A client of the run's coordinator."""
        found = self._wait(lambda: re.search(r"coordinator at (\S+),", "".join(self._said)))
        assert found is not None
        return AdminClient(f"grpc:{found[1]}")

    def at(self, step: int, disturb: Callable[[], object]) -> None:
        """Disturb the run once it has made that many steps, and wait until it goes on."""
        self._wait(lambda: self._steps() >= step)
        began, before = time.monotonic(), self._steps()
        disturb()
        self._wait(lambda: self._steps() >= before + 2)  # one may have been on its way
        self.pauses.append(time.monotonic() - began)

    def kill(self, title: str, source: random.Random) -> None:
        """Kill one of the run's processes of this title with SIGKILL, as soon as there is one.

        Of several coordinators the oldest is killed, since the others stand by.
        """
        found = self._wait(lambda: [p for p in family(self.process) if title in title_of(p)])
        found.sort(key=lambda p: p.create_time())
        (found[0] if title == COORDINATOR else source.choice(found)).kill()

    def finish(self) -> list[float]:
        """Wait for the end of the run; return its losses, step by step."""
        members = family(self.process)
        assert self.process.wait(300) == 0, "".join(self._said)
        self._close()
        assert_gone(members)
        return losses(self.output)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._close()

    def _wait(self, condition: Callable[[], T]) -> T:
        """Wait until a condition is true, as long as the run goes on."""

        def now() -> T:
            assert self.process.poll() is None, "".join(self._said)
            return condition()

        return wait_until(now, seconds=300.0)

    def _close(self) -> None:
        self._listener.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)

    def _steps(self) -> int:
        lines = read_metrics(self.output / METRICS_FILE)
        return int(lines[-1]["step"]) if lines else 0


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def differ(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
