"""Processes with limits of time and memory, for what strangers' files make a computer do."""

from __future__ import annotations

__all__: list[str] = []
