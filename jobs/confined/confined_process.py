"""A process with limits of time and memory, as the process that started it sees it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import DataError

_START = "import sys; from importlib import import_module; module, *sys.path[:] = sys.argv[1:]; "
_START += "import_module(module).main()"
_ROOT = str(Path(__file__).parents[2])
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """What one answer of a confined process may take.

    Attributes:
        cpu_seconds: Seconds of CPU time.
        seconds: Seconds by the clock, for a machine that is busy with other things.
        memory: Bytes of the process beside those of the interpreter, which all answers share.
    """

    cpu_seconds: float = 2.0
    seconds: float = 60.0
    memory: int = 512 << 20


class ConfinedProcess:
    """Starts a process and asks it questions; used by one thread at a time.

    Args:
        worker: Module whose `main` calls `answer_lines`.
        limits: Limits of each answer, and of the beginning.
        settings: What the worker begins with, in JSON's types.
        data: Bytes that it begins with.

    Attributes:
        alive: Whether it has not been ended.

    Raises:
        DataError: The worker cannot begin; the text says why.
    """

    def __init__(self, worker: str, limits: ProcessLimits, settings: Any = None, data: bytes = b"") -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        handles = [_in_memory(data)] if data else []
        try:
            with theirs:
                # The import path is this process's own: `raymoe` may run from a directory of a Ray job.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, worker, _ROOT, *filter(None, sys.path)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    pass_fds=handles,
                )
        finally:
            for handle in handles:
                os.close(handle)
        self.alive = True
        given = {
            "settings": settings,
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory,
            "data": handles[0] if handles else None,
        }
        try:
            self.ask(given)
        except DataError:
            self.close()
            raise

    def ask(self, question: Any) -> Any:
        """The answer to a question.

        Raises:
            DataError: The answer is an error, or the process exceeds a limit or ends; then `alive` may be
                false.
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
        return reply["answer"]

    def lives(self) -> bool:
        """Whether the process can be asked."""
        return self.alive and self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._socket.close()

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
        if status == -signal.SIGABRT:  # what libraries in Rust and C++ do without memory
            return f"it crashes, or needs more than {self._limits.memory >> 20} MiB of memory"
        return f"its process ended with status {status}"


def _in_memory(data: bytes) -> int:
    """A descriptor of a file in memory."""
    handle = os.memfd_create("confined")
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(data)
    return handle


__all__ = ["ConfinedProcess", "ProcessLimits"]
