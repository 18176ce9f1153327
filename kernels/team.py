"""Where the rows of a step lie while heads look into the cache, so that a second thread can take a part."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Words of a desk, each in a cache line of its own where both threads write.
NEXT: Final = 0  # round · ROUND + the piece that nobody has taken yet
DONE: Final = 8  # pieces that are done
PIECES: Final = 16  # round · ROUND + number of pieces
LAYER: Final = 17
_WORDS: Final = 24
ROUND: Final = 1 << 20
"""More than the pieces of a round. Whoever has counted `NEXT` up and then loses the core for a while holds a
number of an earlier round, which must not pass for a piece of this one."""


class Desk(NamedTuple):
    """Buffers of N rows at most.

    Attributes:
        words: see above.
        queries: [N, H', W], with a head of zeros where there is an odd number.
        seen: [N, H', C], what the heads have found.
        length: [N], entries that each row sees.
        pages: [N, P], of each row's sequence.
    """

    words: Array
    queries: Array
    seen: Array
    length: Array
    pages: Array

    @classmethod
    def of(cls, *, rows: int, heads: int, width: int, latent: int, pages: int, dtype: Any) -> Desk:
        """An empty one."""
        even = heads + heads % 2
        return cls(
            words=np.zeros(_WORDS, np.int64),
            queries=np.zeros((rows, even, width), dtype),
            seen=np.zeros((rows, even, latent), dtype),
            length=np.zeros(rows, np.int64),
            pages=np.zeros((rows, pages), np.int64),
        )


__all__ = ["DONE", "LAYER", "NEXT", "PIECES", "ROUND", "Desk"]
