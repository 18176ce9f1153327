"""A process that renders one chat template, as the process that started it sees it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import DataError
from jobs.chat.chat_template import ChatTemplate

_START = "import sys; sys.path[:] = sys.argv[1:]; from jobs.chat.rendering_worker import main; main()"
_ROOT = str(Path(__file__).parents[2])
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering of a template may take.

    Attributes:
        cpu_seconds: Seconds of CPU time.
        seconds: Seconds by the clock, for a machine that is busy with other things.
        memory: Bytes beside those of the interpreter.
        characters: Characters of the prompt.
    """

    cpu_seconds: float = 2.0
    seconds: float = 60.0
    memory: int = 512 << 20
    characters: int = 16 << 20


class RenderingProcess:
    """Starts a process for a template and asks it for prompts; used by one thread at a time.

    Args:
        template: The template.
        limits: Limits of each rendering, and of reading the template.

    Raises:
        DataError: The template cannot be read.
    """

    def __init__(self, template: ChatTemplate, limits: RenderLimits) -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        with theirs:
            # The import path is this process's own: `raymoe` may run from a directory of a Ray job.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, _ROOT, *filter(None, sys.path)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
            )
        self.alive = True
        settings = {
            "source": template.source,
            "special": dict(template.special),
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory,
            "characters": limits.characters,
        }
        try:
            self._ask(settings)
        except DataError as error:
            self.close()
            raise DataError(f"the chat template cannot be read: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the assistant's answer follows.

        Raises:
            DataError: The template rejects these messages, or exceeds a limit; then `alive` may be false.
        """
        try:
            return self._ask(messages)
        except DataError as error:
            raise DataError(f"the chat template cannot render these messages: {error}") from None

    def lives(self) -> bool:
        """Whether the process can be asked."""
        return self.alive and self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _ask(self, question: Any) -> str:
        """Send a line, and return the text of its answer.

        Raises:
            DataError: The answer is an error, or the process has ended or was ended.
        """
        try:
            line = json.dumps(question).encode() + b"\n"
        except (RecursionError, TypeError, ValueError) as error:
            raise DataError(f"they are no JSON: {error}") from None
        until = time.monotonic() + self._limits.seconds
        try:
            self._socket.settimeout(self._limits.seconds)
            self._socket.sendall(line)
            reply = json.loads(self._line(until))
        except TimeoutError:
            self.close()
            raise DataError(f"it takes more than {self._limits.seconds:g} s") from None
        except (OSError, ValueError):  # the process has ended, perhaps in the middle of its answer
            raise DataError(self._end()) from None
        if "error" in reply:
            raise DataError(reply["error"])
        text: str = reply["text"]
        return text

    def _line(self, until: float) -> bytes:
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(_CHUNK)
            if not part:
                raise ConnectionError
            parts.append(part)
        return b"".join(parts)

    def _end(self) -> str:
        """Why the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        status = self._process.returncode
        self.close()
        if status == -signal.SIGPROF:
            return f"it takes more than {self._limits.cpu_seconds:g} s of CPU time"
        return f"its process ended with status {status}"


def check_template(template: ChatTemplate) -> None:
    """Check that a template can be read.

    Raises:
        DataError: It cannot; the message says where.
    """
    RenderingProcess(template, RenderLimits()).close()


__all__ = ["RenderLimits", "RenderingProcess", "check_template"]
