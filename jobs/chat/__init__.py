"""Chat templates: conversations as prompts, rendered in processes of their own."""

from __future__ import annotations

__all__: list[str] = []
