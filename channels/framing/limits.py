"""Limits of messages between machines."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE: Final = 1 << 30
"""Bytes of a message between machines; a peer's longer one is refused before it is held in memory."""

__all__ = ["MAX_MESSAGE"]
