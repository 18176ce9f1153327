"""The held-out documents, packed, and what their loss means: bits per byte, beside zlib's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from jobs.data.packing import PackedCorpus


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Documents to evaluate on.

    Attributes:
        rows: padded, so that every token is a target once, but for each document's first.
        documents: how many there are.
        size: their bytes in UTF-8.
        zlib_bits_per_byte: what zlib needs for the same documents.
    """

    rows: PackedCorpus
    documents: int
    size: int
    zlib_bits_per_byte: float

    def bits_per_byte(self, loss_sum: float, vocab_size: int) -> float:
        """Bits per byte of text.

        Args:
            loss_sum: cross-entropy in nats, summed over all valid targets of all rows.
            vocab_size: a document's first token, which nothing precedes, is charged log(vocab_size).
        """
        nats = loss_sum + self.documents * math.log(vocab_size)
        return nats / math.log(2) / self.size


def zlib_bits_per_byte(texts: Iterable[str]) -> float:
    """What zlib's level 9 makes of the texts in one stream, in bits per byte of UTF-8."""
    stream = zlib.compressobj(level=9)
    size = packed = 0
    for text in texts:
        data = text.encode()
        size += len(data)
        packed += len(stream.compress(data))
    packed += len(stream.flush())
    return 8 * packed / size


__all__ = ["HeldOut", "zlib_bits_per_byte"]
