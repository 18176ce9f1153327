"""The training data: documents read from files, tokenized, and packed into rows."""

from __future__ import annotations
