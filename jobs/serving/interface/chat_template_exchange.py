"""The interface's part in a change of weights: chat template, sampling defaults, and the version's name."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobs.api.backend import Backend
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.checkpoints.generation_defaults import GenerationDefaults, GenerationSource
from jobs.serving.versions import WeightsVersion


class ChatTemplateExchange:
    """Exchanges the chat template and the sampling defaults of the interface when the weights change.

    Args:
        backend: Uses both.
        version: Name of the version to start with.
        source: Where the defaults come from.

    Attributes:
        version: Name of the version in use.
    """

    def __init__(self, backend: Backend, version: str, source: GenerationSource = "auto") -> None:
        self._backend, self._source = backend, source
        self.version = version
        self._prepared: tuple[ChatRenderer, GenerationDefaults] | None = None

    async def prepare(self, version: WeightsVersion) -> None:
        """Read a version's chat template and generation_config.json, and start a process that renders it.

        Raises:
            DataError: One cannot be read.
        """
        self.forget()
        template, defaults = await asyncio.to_thread(self._read, Path(version.directory))
        renderer = ChatRenderer(template, waiting=self._backend.limits.max_queue)
        try:
            await renderer.start()
        except BaseException:
            renderer.close()
            raise
        self._prepared = renderer, defaults

    async def exchange(self, version: WeightsVersion) -> None:
        """Use what has been prepared; conversations that have begun are rendered by the template before."""
        assert self._prepared is not None
        before = self._backend.chat
        self._backend.chat, self._backend.defaults = self._prepared
        self._prepared = None
        before.close()
        self.version = version.name

    def forget(self) -> None:
        """Drop what has been prepared."""
        if self._prepared is not None:
            self._prepared[0].close()
            self._prepared = None

    def close(self) -> None:
        """End the processes of both templates."""
        self.forget()
        self._backend.chat.close()

    def _read(self, directory: Path) -> tuple[ChatTemplate, GenerationDefaults]:
        return ChatTemplate.from_directory(directory), GenerationDefaults.of(directory, self._source)


__all__ = ["ChatTemplateExchange"]
