"""Attention of a step's heads, shared between the thread that computes the step and an assistant.

The step's thread lays out queries, lengths and pages on a desk. A piece of work is two heads of one row. Both
threads take pieces by counting up one word until none is left.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.atomics import add, let_others_run, load, store
from kernels.compiled import compiled_reordered
from kernels.paged_attention import attend_pair

Array = npt.NDArray[Any]

# Words of a desk, each in a cache line of its own where both threads write.
NEXT: Final = 0  # round · ROUND + the first piece that has not been taken
DONE: Final = 8  # number of pieces that are done
PIECES: Final = 16  # round · ROUND + number of pieces
LAYER: Final = 17
_WORDS: Final = 24
ROUND: Final = 1 << 20
"""More than the pieces of a round. A thread that has counted `NEXT` up and then loses the core for a while
holds a number of an earlier round, which must not pass for a piece of this one."""


class Desk(NamedTuple):
    """Buffers of N rows at most, with H' heads: H, or H + 1 with a head of zeros where H is odd.

    Attributes:
        words: [24] int64, `NEXT`, `DONE`, `PIECES` and `LAYER`.
        queries: [N, H', W], in the cache's space.
        seen: [N, H', C], the heads' weighted sums of latents.
        length: [N] int64, number of entries that each row sees.
        pages: [N, P] int64, pages of each row's sequence.
    """

    words: Array
    queries: Array
    seen: Array
    length: Array
    pages: Array

    @classmethod
    def of(cls, *, rows: int, heads: int, width: int, latent: int, pages: int, dtype: Any) -> Desk:
        """A desk of zeros."""
        even = heads + heads % 2
        return cls(
            words=np.zeros(_WORDS, np.int64),
            queries=np.zeros((rows, even, width), dtype),
            seen=np.zeros((rows, even, latent), dtype),
            length=np.zeros(rows, np.int64),
            pages=np.zeros((rows, pages), np.int64),
        )


@compiled_reordered
def attend_together(desk, caches, layer, rows, page_size, shared):
    """Attention of all rows' heads over caches[layer] into `desk.seen`.

    Args:
        caches: [layers, slots, W].
        shared: whether an assistant may take pieces.
    """
    pairs = desk.queries.shape[1] // 2
    if not shared:
        for piece in range(rows * pairs):
            _do_piece(desk, caches[layer], page_size, piece)
        return
    words = desk.words
    start = (words[PIECES] // ROUND + 1) * ROUND
    words[LAYER] = layer
    store(words, DONE, 0)
    store(words, PIECES, start + rows * pairs)
    store(words, NEXT, start)  # from here on pieces can be taken
    _take_pieces(desk, caches, page_size)
    while load(words, DONE) != rows * pairs:
        let_others_run()


@compiled_reordered
def assist(desk, caches, page_size, looks):
    """Process pieces until `looks` consecutive checks find none; return whether any was processed."""
    words = desk.words
    any_came = False
    left = looks
    while left > 0:
        if is_piece(load(words, NEXT), load(words, PIECES)):
            _take_pieces(desk, caches, page_size)
            any_came, left = True, looks
        else:
            left -= 1
            let_others_run()
    return any_came


@compiled_reordered
def is_piece(number, pieces):
    """Whether a number from `NEXT` is a piece of the round of `PIECES`."""
    return number // ROUND == pieces // ROUND and number < pieces


@compiled_reordered
def _take_pieces(desk, caches, page_size):
    """Do pieces until all are taken.

    The layer is read after a piece was taken: it does not change until that piece is done.
    """
    words = desk.words
    while True:
        taken = add(words, NEXT, 1)
        if not is_piece(taken, load(words, PIECES)):
            return
        _do_piece(desk, caches[words[LAYER]], page_size, taken % ROUND)
        add(words, DONE, 1)


@compiled_reordered
def _do_piece(desk, cache, page_size, piece):
    pairs = desk.queries.shape[1] // 2
    row, first = piece // pairs, 2 * (piece % pairs)
    attend_pair(
        desk.queries[row, first : first + 2],
        cache,
        desk.pages[row],
        desk.length[row],
        page_size,
        desk.seen[row, first : first + 2],
    )


__all__ = ["DONE", "LAYER", "NEXT", "PIECES", "ROUND", "Desk", "assist", "attend_together", "is_piece"]
