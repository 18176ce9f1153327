"""The process that accepts requests; it has no weights."""

from __future__ import annotations
