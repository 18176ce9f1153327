"""Deadlines for calls that have no timeout of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `expired` in a thread of its own when an armed deadline passes.

    Arming costs two attribute accesses: the thread sleeps until the last deadline that it has read, and then
    looks for a later one. It starts with the first deadline.
    """

    def __init__(self, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._deadline: float | None = None
        self._wakes_at = float("inf")
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def arm(self, deadline: float) -> None:
        """Call `expired` at `deadline` (of `time.monotonic`) unless disarmed before."""
        self._deadline = deadline
        if deadline >= self._wakes_at:
            return
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()

    def disarm(self) -> None:
        """Forget the deadline: the call is over."""
        self._deadline = None

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                # Written before the deadline is read: a thread that arms after that sees it and notifies.
                self._wakes_at = float("inf")
                deadline = self._deadline
                if deadline is None:
                    self._changed.wait()
                    continue
                remaining = deadline - time.monotonic()
                if remaining > 0:
                    self._wakes_at = deadline
                    self._changed.wait(remaining)
                    continue
                self._deadline = None
                self._expired()


__all__ = ["Watchdog"]
