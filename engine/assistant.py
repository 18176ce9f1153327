"""A second thread for the attention of long contexts, in compiled code and without the interpreter's lock.

It takes pieces of work from a desk as long as some come, and sleeps when none has come for a while.
"""

from __future__ import annotations

import threading
import time
import weakref

from kernels.team import Array, Desk, assist

_LOOKS = 4000  # for work, between two looks at the clock: for those it needs the interpreter's lock
_RESTLESS = 2e-3  # seconds without work after which it sleeps


class Assistant:
    """Starts when it is first wanted; ends with its last reference.

    Args:
        desk: where the work lies.
        caches: [layers, slots, W].
        page_size: positions of a page.
    """

    def __init__(self, desk: Desk, caches: Array, page_size: int) -> None:
        self._awake = threading.Event()
        self._ended = threading.Event()
        self._work = (desk, caches, page_size, self._awake, self._ended)
        self._started = False

    def ready(self) -> bool:
        """Whether it looks for work now. If not it will: it is woken, or started."""
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
            if not ended.is_set():  # or `_end` has been and gone: nobody would wake this thread again
                awake.wait()
            last = time.monotonic()


def _end(awake: threading.Event, ended: threading.Event) -> None:
    ended.set()
    awake.set()


__all__ = ["Assistant"]
