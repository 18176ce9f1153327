"""Checkpoints on disk: the store of a run, the trunk's part, and models loaded from them."""

from __future__ import annotations
