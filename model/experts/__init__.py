"""Routed experts: the protocols by which a transformer reaches them, their mathematics, a local module."""

from __future__ import annotations
