"""A few confined processes that answer in threads, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from errors import DataError, QueueFull, ResourceError

_PROCESSES = 2


class Confined(Protocol):
    """What a pool keeps: something with a process of its own."""

    @property
    def alive(self) -> bool:
        """Whether the process has not been ended."""
        ...

    def lives(self) -> bool:
        """Whether the process can be asked."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


_P = TypeVar("_P", bound=Confined)
_T = TypeVar("_T")


class ConfinedPool(Generic[_P]):
    """A few processes of one kind.

    A process is started when it is first needed, and replaced when an answer has ended it. An answer whose
    request is cancelled ends by itself, within its limits; one that still waits is not begun.

    Args:
        make: Starts a process; raises DataError.
        name: Name of the threads.
        waiting: Questions that may wait for a process; further ones are refused.
        full: What is said about the number that waits.
    """

    def __init__(self, make: Callable[[], _P], *, name: str, waiting: int, full: str) -> None:
        self._make, self._waiting, self._full = make, waiting, full
        self._threads = ThreadPoolExecutor(_PROCESSES, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._idle: list[_P] = []
        self._pending = 0
        self._closed = False

    async def start(self) -> None:
        """Start the first process.

        Raises:
            DataError: It does not start.
        """
        await asyncio.wrap_future(self._threads.submit(self._warm))

    async def ask(self, question: Callable[[_P], _T]) -> _T:
        """What a function of a process returns.

        Raises:
            DataError: The function raises it.
            ResourceError: No process can be started.
            QueueFull: Too many questions wait already.
        """
        if self._pending >= _PROCESSES + self._waiting:
            raise QueueFull(f"{self._waiting} {self._full}")
        self._pending += 1
        asked = [question]
        try:
            return await asyncio.wrap_future(self._threads.submit(self._ask, asked))
        finally:
            asked.clear()  # until its turn, the queue of the threads keeps also what is cancelled
            self._pending -= 1

    def close(self) -> None:
        """End the processes; answers under way, and questions that wait, are completed first."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
        self._threads.shutdown(wait=False)

    def __del__(self) -> None:
        self.close()

    def _ask(self, asked: list[Callable[[_P], _T]]) -> _T:
        question = asked.pop()
        try:
            process = self._take()
        except DataError as error:  # of what has begun before
            raise ResourceError(str(error)) from error
        try:
            return question(process)
        finally:
            self._give_back(process)

    def _take(self) -> _P:
        """An idle process that lives, or a new one.

        Raises:
            DataError: The new process does not start.
        """
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.lives():
                    return process
                process.close()
        return self._make()

    def _give_back(self, process: _P) -> None:
        with self._lock:
            keep = process.alive and not self._closed
            if keep:
                self._idle.append(process)
            elif not self._closed:  # a request to come does not wait for the replacement
                self._threads.submit(self._warm_again)
        if not keep and process.alive:
            process.close()

    def _warm(self) -> None:
        self._give_back(self._take())

    def _warm_again(self) -> None:
        with suppress(DataError):  # the next request tries again, and has the error
            self._warm()


__all__ = ["Confined", "ConfinedPool"]
