"""Measurements, each beside a peer or a bare counterpart in the same run."""

from __future__ import annotations

__all__: list[str] = []
