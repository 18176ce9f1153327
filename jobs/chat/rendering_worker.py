"""The process that renders a chat template: limits itself, then answers one line of JSON with another.

The first line is `{"source", "special", "cpu_seconds", "memory", "characters"}`; its answer says whether the
template can be read. Every other line is a list of messages. An answer is `{"text"}` or `{"error"}`.

A template is a program that others have written. The kernel ends this process when a rendering takes more
CPU time than it may, which works in the middle of one long operation too, where no exception could be raised.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from jobs.chat.template_environment import compile_template, render

_LONGEST_ERROR = 500  # characters


def main() -> None:
    """Answer lines of standard input on standard output until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the process that asks decides
    settings = json.loads(sys.stdin.buffer.readline())
    _limit(settings["memory"])
    template: Template | None = None
    line = b""
    while True:
        # The timer counts the CPU time of this process; at its end the signal's default action ends it.
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        try:
            if template is None:
                template, text = compile_template(settings["source"]), ""
            else:
                text = render(
                    template, json.loads(line), settings["special"], characters=settings["characters"]
                )
            answer = json.dumps({"text": text})
        except MemoryError:
            answer = json.dumps({"error": f"it needs more than {settings['memory'] >> 20} MiB of memory"})
        except Exception as error:
            answer = json.dumps({"error": _told(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()
        line = sys.stdin.buffer.readline()
        if template is None or not line:
            return


def _limit(memory: int) -> None:
    """Allow this process so many bytes more than it has now, and no files."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


def _told(error: Exception) -> str:
    """An error in one line."""
    text: Any = str(error)
    if isinstance(error, TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif not isinstance(error, TemplateError):
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"


__all__ = ["main"]
