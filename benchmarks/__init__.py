"""Benchmarks; each compares with a peer, or with a bare counterpart, in the same run."""

from __future__ import annotations

__all__: list[str] = []
