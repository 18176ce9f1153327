"""The interface's part in a change of weights: chat template, sampling defaults, and the version's name."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jobs.api.backend import Backend
from jobs.api.chat_template import ChatTemplate
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
        self._prepared: tuple[ChatTemplate, GenerationDefaults] | None = None

    async def prepare(self, version: WeightsVersion) -> None:
        """Read a version's chat template and generation_config.json.

        Raises:
            DataError: One cannot be read.
        """
        self._prepared = await asyncio.to_thread(self._read, Path(version.directory))

    async def exchange(self, version: WeightsVersion) -> None:
        """Use what has been prepared."""
        assert self._prepared is not None
        self._backend.chat, self._backend.defaults = self._prepared
        self._prepared = None
        self.version = version.name

    def forget(self) -> None:
        """Drop what has been prepared."""
        self._prepared = None

    def _read(self, directory: Path) -> tuple[ChatTemplate, GenerationDefaults]:
        return ChatTemplate.from_directory(directory), GenerationDefaults.of(directory, self._source)


__all__ = ["ChatTemplateExchange"]
