"""The positions of a step of few rows, as arrays for compiled functions.

Shapes: N positions, S sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import Stretch
from engine.few_rows.layers import Fields
from kernels.attention import RowPlaces

LONG_CONTEXT = 384
"""Cached positions over all rows from which attention is shared with the assistant thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsBatch:
    """The positions of one step.

    Attributes:
        tokens: Tokens at these positions.
        places: The fields of a `RowPlaces`; unused entries of its page table are 0.
        ends: Row after the last one of each stretch, in the order of the stretches.
        long: Whether attention covers so many cached positions that it is shared with the assistant thread.
    """

    tokens: list[int]
    places: Fields
    ends: tuple[int, ...]
    long: bool

    def select(self, rows: Sequence[int]) -> FewRowsBatch:
        """The batch of some rows only, without the ends of stretches."""
        at = list(rows)
        position, slot, sequence, table = self.places
        return FewRowsBatch(
            tokens=[self.tokens[row] for row in at],
            places=tuple(RowPlaces(position[at], slot[at], sequence[at], table)),
            ends=(),
            long=self.long,
        )


def collect_few(stretches: Sequence[Stretch], *, page_size: int) -> FewRowsBatch:
    """The batch of these stretches, in the order given."""
    tokens: list[int] = []
    rows: list[tuple[int, int, int]] = []
    ends: list[int] = []
    width = max(-(-stretch.end // page_size) for stretch in stretches)
    table = np.zeros((len(stretches), width), np.int64)
    for at, stretch in enumerate(stretches):
        tokens += stretch.tokens
        pages = stretch.pages
        used = -(-stretch.end // page_size)
        table[at, :used] = pages[:used]
        for position in range(stretch.start, stretch.end):
            rows.append((position, pages[position // page_size] * page_size + position % page_size, at))
        ends.append(len(tokens))
    position, slot, sequence = np.ascontiguousarray(np.array(rows, np.int64).T)
    return FewRowsBatch(
        tokens=tokens,
        places=tuple(RowPlaces(position, slot, sequence, table)),
        ends=tuple(ends),
        long=sum(row[0] for row in rows) >= LONG_CONTEXT,
    )


__all__ = ["FewRowsBatch", "collect_few"]
