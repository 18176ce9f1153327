"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T],
    *,
    seconds: float = 60.0,
    every: float = 0.01,
    ignoring: type[Exception] | tuple[type[Exception], ...] = (),
    what: Callable[[], object] | None = None,
) -> T:
    """Wait until a condition is true; return its value.

    Args:
        condition: Called again and again; what it raises ends the wait.
        seconds: After these the wait ends with an error.
        every: Seconds between two calls.
        ignoring: Exceptions of the condition that mean no more than "not yet".
        what: Describes the state for the error.

    Raises:
        AssertionError: The condition has not been true in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        last: object = None
        try:
            value = condition()
            if value:
                return value
        except ignoring as error:
            last = error
        if time.monotonic() > deadline:
            state = last if what is None else what()
            raise AssertionError(f"not within {seconds:g} s" + ("" if state is None else f": {state}"))
        time.sleep(every)


__all__ = ["wait_until"]
