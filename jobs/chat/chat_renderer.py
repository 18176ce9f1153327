"""Renderer of conversations: runs the chat template in confined processes, off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.chat.chat_template import ChatTemplate
from jobs.chat.rendering_process import RenderingProcess, RenderLimits
from jobs.confined.process_pool import ConfinedPool


class ChatRenderer:
    """A chat template, and the few processes that render it.

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
        self.template = template
        limits = limits or RenderLimits()
        self._pool = ConfinedPool(
            lambda: RenderingProcess(template, limits),
            name="chat-template",
            waiting=waiting,
            full="conversations wait for the chat template",
        )

    async def start(self) -> None:
        """Start the first process.

        Raises:
            DataError: The template cannot be read.
        """
        await self._pool.start()

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the assistant's answer follows.

        Raises:
            DataError: The template rejects these messages, or exceeds a limit.
            ResourceError: No process can be started.
            QueueFull: Too many conversations wait already.
        """
        return await self._pool.ask(lambda process: process.render(messages))

    def close(self) -> None:
        """End the processes; renderings under way, and those that wait, are completed first."""
        self._pool.close()


__all__ = ["ChatRenderer"]
