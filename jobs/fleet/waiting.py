"""Lines that say what a command waits for, and how busy the machine is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[str], object]
"""Shows one line to the user."""

_EVERY_SECONDS = 10.0


def machine_load() -> str:
    """The number of processes that want to run, averaged over a minute, beside the number of cores."""
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count() or 1} cores"


def is_busy() -> bool:
    """Whether more processes want to run than this machine has cores."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def busy_note() -> str:
    """What an error about a wait adds if this machine is busy, with its load; empty if it is not."""
    return f"; this machine is busy ({machine_load()}): wait until it is less so" if is_busy() else ""


@contextmanager
def telling(what: str, tell: Tell | None, *, every: float = _EVERY_SECONDS) -> Iterator[None]:
    """Say every few seconds that the command waits, until the context ends.

    Args:
        what: What it waits for.
        tell: Shows the lines; None shows none.
        every: Seconds between two lines.
    """
    if tell is None:
        yield
        return
    done = threading.Event()

    def run() -> None:
        while not done.wait(every):
            tell(f"waiting for {what} ({machine_load()})")

    thread = threading.Thread(target=run, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


__all__ = ["Tell", "busy_note", "is_busy", "machine_load", "telling"]
