"""The process that takes requests; it has no weights."""

from __future__ import annotations
