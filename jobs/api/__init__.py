"""The OpenAI-compatible interface of a served model."""

from __future__ import annotations

from jobs.api.application import build_api

__all__ = ["build_api"]
