"""Renderer of conversations: runs the chat template in worker processes, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from errors import DataError, QueueFull, ResourceError
from jobs.chat.chat_template import ChatTemplate
from jobs.chat.rendering_process import RenderingProcess, RenderLimits

_PROCESSES = 2


class ChatRenderer:
    """A chat template, and the few processes that render it.

    A process is started when it is first needed, and replaced when a rendering has ended it. A rendering
    whose request is cancelled ends by itself, within its limits; one that still waits is not begun.

    Args:
        template: The template.
        limits: Limits of each rendering.
        waiting: Conversations that may wait for a process; further ones are refused.

    Attributes:
        template: The template.
    """

    def __init__(
        self, template: ChatTemplate, *, limits: RenderLimits | None = None, waiting: int = 256
    ) -> None:
        self.template, self._limits, self._waiting = template, limits or RenderLimits(), waiting
        self._threads = ThreadPoolExecutor(_PROCESSES, thread_name_prefix="chat-template")
        self._lock = threading.Lock()
        self._idle: list[RenderingProcess] = []
        self._pending = 0
        self._closed = False

    async def start(self) -> None:
        """Start the first process.

        Raises:
            DataError: The template cannot be read.
        """
        await asyncio.wrap_future(self._threads.submit(self._warm))

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the assistant's answer follows.

        Raises:
            DataError: The template rejects these messages, or exceeds a limit.
            ResourceError: No process can be started.
            QueueFull: Too many conversations wait already.
        """
        if self._pending >= _PROCESSES + self._waiting:
            raise QueueFull(f"{self._waiting} conversations wait for the chat template")
        self._pending += 1
        try:
            return await asyncio.wrap_future(self._threads.submit(self._render, messages))
        finally:
            self._pending -= 1

    def close(self) -> None:
        """End the processes; renderings under way, and those that wait, are completed first."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
        self._threads.shutdown(wait=False)

    def __del__(self) -> None:
        self.close()

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            process = self._take()
        except DataError as error:  # of a template that has been read before
            raise ResourceError(str(error)) from error
        try:
            return process.render(messages)
        finally:
            self._give_back(process)

    def _take(self) -> RenderingProcess:
        """An idle process that lives, or a new one.

        Raises:
            DataError: The template cannot be read, or the new process does not start.
        """
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.lives():
                    return process
                process.close()
        return RenderingProcess(self.template, self._limits)

    def _give_back(self, process: RenderingProcess) -> None:
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


__all__ = ["ChatRenderer"]
