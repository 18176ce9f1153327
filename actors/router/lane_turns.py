"""Turns of a worker's lanes: while the tokens of one are away, another computes, and not both at once.

Threads that merely share the cores fall into step: all of them compute at the same time, and then all wait
for the hosts at the same time. A lane that computes alone, with all cores, is away while the next one
computes: ping-pong.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """So many lanes compute at a time.

    Args:
        at_once: how many.
    """

    def __init__(self, at_once: int) -> None:
        self._free = threading.Semaphore(at_once)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A lane's work: begins when it is its turn."""
        with self._free:
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within a lane's work: it waits, and lets another compute."""
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()


__all__ = ["Turns"]
