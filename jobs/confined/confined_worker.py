"""The inside of a confined process: limits itself, then answers one line of JSON with another.

The first line is `{"settings", "cpu_seconds", "memory", "data"}`, where `data` is a descriptor or null; its
answer says whether the worker could begin. Every other line is a question. An answer is `{"answer"}` or
`{"error"}`.

The kernel ends this process when an answer takes more CPU time than it may, which works in the middle of one
long operation of a library too, where no exception could be raised.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[Any], Any]
"""Answers a question, both in JSON's types."""

_LONGEST_ERROR = 500  # characters


def answer_lines(begin: Callable[[Any, bytes], Answer], told: Callable[[BaseException], str]) -> None:
    """Answer lines of standard input on standard output until the input ends.

    Args:
        begin: Gets the settings, and the bytes that came with them; returns what answers.
        told: Describes an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the process that asks decides
    given = json.loads(sys.stdin.buffer.readline())
    _limit(given["memory"])
    answer: Answer | None = None
    line = b""
    while True:
        # The timer counts the CPU time of this process; at its end the signal's default action ends it.
        signal.setitimer(signal.ITIMER_PROF, given["cpu_seconds"])
        try:
            if answer is None:
                answer, found = begin(given["settings"], _bytes(given["data"])), None
            else:
                found = answer(json.loads(line))
            reply = json.dumps({"answer": found})
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {given['memory'] >> 20} MiB of memory"})
        except BaseException as error:  # a panic of a library in Rust is no Exception
            reply = json.dumps({"error": _one_line(told(error))})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if answer is None or not line:
            return


def _limit(memory: int) -> None:
    """Allow this process so many bytes more than it has now, and no files."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


def _bytes(handle: int | None) -> bytes:
    if handle is None:
        return b""
    with os.fdopen(handle, "rb") as file:
        file.seek(0)
        return file.read()


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"


__all__ = ["Answer", "answer_lines"]
