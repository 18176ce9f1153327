"""The packed held-out documents, and their loss in bits per byte, to compare with zlib's."""

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
        rows: Padded rows; every token but each document's first is a target exactly once.
        documents: Number of documents.
        size: Bytes of all documents in UTF-8.
        zlib_bits_per_byte: Bits per byte that zlib needs for the same documents.
        begun: Whether every document begins with BOS, which adds nothing to the bits per byte.
    """

    rows: PackedCorpus
    documents: int
    size: int
    zlib_bits_per_byte: float
    begun: bool = False

    def bits_per_byte(self, loss_sum: float, vocab_size: int) -> float:
        """Bits per byte of text.

        Args:
            loss_sum: Cross-entropy in nats, summed over all valid targets of all rows.
            vocab_size: Size of the vocabulary; without BOS the first token of a document, which is no
                target, costs log(vocab_size).
        """
        nats = loss_sum + (0.0 if self.begun else self.documents * math.log(vocab_size))
        return nats / math.log(2) / self.size


def zlib_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of UTF-8 for texts that zlib compresses as one stream at level 9."""
    stream = zlib.compressobj(level=9)
    size = packed = 0
    for text in texts:
        data = text.encode()
        size += len(data)
        packed += len(stream.compress(data))
    packed += len(stream.flush())
    return 8 * packed / size


__all__ = ["HeldOut", "zlib_bits_per_byte"]
