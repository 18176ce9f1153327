"""A second thread for the attention of long contexts, in compiled code without the interpreter's lock.

The thread polls a `Desk` for work, and sleeps after a while without work.
"""

from __future__ import annotations

import threading
import time
import weakref

from kernels.team import Array, Desk, assist

_LOOKS = 4000  # polls of the desk between two readings of the clock, which need the interpreter's lock
_RESTLESS = 2e-3  # seconds without work after which the thread sleeps


class Assistant:
    """A thread that starts at the first call of `ready` and ends when this object is deleted.

    Args:
        desk: Where work is taken from.
        caches: [layers, slots, W], the KV cache.
        page_size: Positions of a page.
    """

    def __init__(self, desk: Desk, caches: Array, page_size: int) -> None:
        self._awake = threading.Event()
        self._ended = threading.Event()
        self._work = (desk, caches, page_size, self._awake, self._ended)
        self._started = False

    def ready(self) -> bool:
        """Whether the thread is polling for work; if not, start it or wake it for later calls."""
        if self._awake.is_set():
            return True
        if not self._started:
            self._started = True
            threading.Thread(target=_assist, args=self._work, name="attention", daemon=True).start()
            weakref.finalize(self, _end, self._awake, self._ended)
        self._awake.set()
        return False


def _assist(
    desk: Desk, caches: Array, page_size: int, awake: threading.Event, ended: threading.Event
) -> None:
    last = time.monotonic()
    while not ended.is_set():
        if assist(desk, caches, page_size, _LOOKS):
            last = time.monotonic()
        elif time.monotonic() - last > _RESTLESS:
            awake.clear()
            if not ended.is_set():  # after `_end` has run, nothing would wake this thread
                awake.wait()
            last = time.monotonic()


def _end(awake: threading.Event, ended: threading.Event) -> None:
    ended.set()
    awake.set()


__all__ = ["Assistant"]
