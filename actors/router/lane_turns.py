"""Turns of a worker's lanes: while one lane waits for hosts, another one computes.

Threads that share cores without turns synchronise: all of them compute at the same time, and then all wait
for the hosts at the same time. With turns, a lane computes alone with all cores. While one lane waits for
hosts, another computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from actors.messages.timeline import Timeline


class Turns:
    """Limits the number of lanes that compute at a time.

    Args:
        at_once: The number.
    """

    def __init__(self, at_once: int) -> None:
        self._free = threading.Semaphore(at_once)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Surrounds a lane's work, which begins when it is its turn."""
        with self._free:
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """Surrounds a wait within a lane's work, in which another lane computes."""
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()


class LaneWaits:
    """Surrounds the waits of lanes for hosts: other lanes compute meanwhile, and a timeline records the wait.

    Args:
        turns: Limit on the lanes that compute at once, whose threads work within `Turns.taken`; None if they
            share the cores.
        timeline: None records nothing.
    """

    def __init__(self, turns: Turns | None, timeline: Timeline | None) -> None:
        self._turns, self._timeline = turns, timeline

    @contextmanager
    def away(self, step: int, host_id: str) -> Iterator[None]:
        """Surrounds one wait for a host, in a step."""
        turns, timeline = self._turns, self._timeline
        with (
            nullcontext() if turns is None else turns.away(),
            nullcontext() if timeline is None else timeline.span(step, f"wait for {host_id}"),
        ):
            yield


__all__ = ["LaneWaits", "Turns"]
