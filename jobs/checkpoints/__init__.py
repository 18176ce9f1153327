"""Checkpoints on disk: where they are, and how the trunk and the experts are read from them."""

from __future__ import annotations
