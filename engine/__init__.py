"""Generation without Ray: how the next token is chosen."""

from __future__ import annotations

from engine.sampling import next_token

__all__ = ["next_token"]
