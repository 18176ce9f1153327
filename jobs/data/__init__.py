"""From files to packed rows of tokens."""

from __future__ import annotations
