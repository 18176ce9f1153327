"""What of the interface needs no API key."""

from __future__ import annotations

OPEN_PATHS = ("/health", "/-/healthz")
"""Paths that need no API key."""

FRONT_HEADER = "x-raymoe-front"
"""Header field with which the front marks requests that came by its port for metrics, which needs no key."""

__all__ = ["FRONT_HEADER", "OPEN_PATHS"]
