"""Text of tokens: decoded as they are generated, ended at stop strings; and the bytes of each token."""

from __future__ import annotations

from engine.text.detokenizer import Detokenizer
from engine.text.text_stream import TextStream

__all__ = ["Detokenizer", "TextStream"]
