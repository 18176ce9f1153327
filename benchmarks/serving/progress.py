"""A line of progress: overwritten on a terminal, otherwise printed every few seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

_PLAIN_SECONDS = 5.0  # between lines without a terminal
_TERMINAL_SECONDS = 0.1


class ProgressLine:
    """Shows the latest of many lines.

    Args:
        stream: Where to print; by default stderr.
        clock: Seconds, monotonic.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._shown = -math.inf
        self._open = False  # whether the cursor is at the end of a line

    def __call__(self, text: str) -> None:
        """Show a line, unless the last one was shown a very short time ago."""
        now = self._clock()
        if now - self._shown < (_TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS):
            return
        self._shown = now
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._open = True
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()


__all__ = ["ProgressLine"]
