"""The channel between two processes on one GPU."""

from __future__ import annotations
