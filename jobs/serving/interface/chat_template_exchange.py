"""The interface's part in a change of weights: the chat template, and the name of the version."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobs.api.backend import Backend
from jobs.api.chat_template import ChatTemplate
from jobs.serving.versions import WeightsVersion


class ChatTemplateExchange:
    """Exchanges the chat template of the interface when the weights change.

    Args:
        backend: Uses the chat template.
        version: Name of the version to start with.

    Attributes:
        version: Name of the version in use.
    """

    def __init__(self, backend: Backend, version: str) -> None:
        self._backend = backend
        self.version = version
        self._prepared: ChatTemplate | None = None

    async def prepare(self, version: WeightsVersion) -> None:
        """Read a version's chat template.

        Raises:
            DataError: It cannot be read.
        """
        self._prepared = await asyncio.to_thread(ChatTemplate.from_directory, Path(version.directory))

    async def exchange(self, version: WeightsVersion) -> None:
        """Use the prepared chat template."""
        assert self._prepared is not None
        self._backend.chat, self._prepared = self._prepared, None
        self.version = version.name

    def forget(self) -> None:
        """Drop the prepared chat template."""
        self._prepared = None


__all__ = ["ChatTemplateExchange"]
