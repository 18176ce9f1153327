"""A process that renders one chat template, as the process that started it sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errors import DataError
from jobs.chat.chat_template import ChatTemplate
from jobs.confined.confined_process import ConfinedProcess, ProcessLimits

_WORKER = "jobs.chat.rendering_worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits(ProcessLimits):
    """What one rendering of a template may take.

    Attributes:
        characters: Characters of the prompt.
    """

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
        settings = {
            "source": template.source,
            "special": dict(template.special),
            "characters": limits.characters,
        }
        try:
            self._process = ConfinedProcess(_WORKER, limits, settings)
        except DataError as error:
            of = f" of {template.place}" if template.place else ""
            raise DataError(f"the chat template{of} cannot be read: {error}; correct or remove it") from None

    @property
    def alive(self) -> bool:
        """Whether the process has not been ended."""
        return self._process.alive

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the assistant's answer follows.

        Raises:
            DataError: The template rejects these messages, or exceeds a limit; then `alive` may be false.
        """
        try:
            text: str = self._process.ask(messages)
        except DataError as error:
            raise DataError(f"the chat template cannot render these messages: {error}") from None
        return text

    def lives(self) -> bool:
        """Whether the process can be asked."""
        return self._process.lives()

    def close(self) -> None:
        """End the process."""
        self._process.close()


def check_template(template: ChatTemplate) -> None:
    """Check that a template can be read.

    Raises:
        DataError: It cannot; the message says where.
    """
    RenderingProcess(template, RenderLimits()).close()


__all__ = ["RenderLimits", "RenderingProcess", "check_template"]
