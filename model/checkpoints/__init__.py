"""Checkpoints in Hugging Face's DeepSeek-V3 format."""

from __future__ import annotations
