"""What of a checkpoint the interface itself uses: the chat template, and the name of the weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobs.api.backend import Backend
from jobs.api.chat_template import ChatTemplate
from jobs.serving.versions import WeightsVersion


class ChatTemplateExchange:
    """What of a checkpoint the interface uses, and the exchange of it.

    Args:
        backend: uses it.
        version: name of the weights to begin with.

    Attributes:
        version: name of the weights in use.
    """

    def __init__(self, backend: Backend, version: str) -> None:
        self._backend = backend
        self.version = version
        self._prepared: ChatTemplate | None = None

    async def prepare(self, version: WeightsVersion) -> None:
        """Read a version's chat template.

        Raises:
            DataError: it cannot be read.
        """
        self._prepared = await asyncio.to_thread(ChatTemplate.beside, Path(version.directory))

    async def exchange(self, version: WeightsVersion) -> None:
        """Use what was prepared."""
        assert self._prepared is not None
        self._backend.chat, self._prepared = self._prepared, None
        self.version = version.name

    def forget(self) -> None:
        """Drop what was prepared."""
        self._prepared = None


__all__ = ["ChatTemplateExchange"]
