"""Compiled arithmetic for a few rows at a time, where starting a tensor operation costs more than doing it."""

from __future__ import annotations
