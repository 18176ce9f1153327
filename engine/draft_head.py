"""The head that drafts are read off: int8, a quarter of the memory to read. It may err, a draft is verified.

Shapes: N rows, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels import decode

Array = npt.NDArray[Any]

_BLOCK = 1024  # rows that are rounded at a time


@dataclass(frozen=True, slots=True)
class DraftHead:
    """Rows of a head in 8 bits.

    Attributes:
        rows: [V, D] int8, of -127 … 127.
        scale: [V], what each row is to be multiplied with.
    """

    rows: Array
    scale: Array

    @classmethod
    def of(cls, head: Array) -> DraftHead:
        """From the head [V, D] itself."""
        scale = np.abs(head).max(1) / 127
        rows = np.empty(head.shape, np.int8)
        for at in range(0, len(head), _BLOCK):
            part = slice(at, at + _BLOCK)
            rows[part] = np.rint(head[part] / np.where(scale[part] > 0, scale[part], 1)[:, None])
        return cls(rows, scale)

    def likeliest(self, states: Array) -> list[int]:
        """The likeliest token after each of the normed states [N, D]."""
        out = np.empty(len(states), np.int64)
        decode.likeliest(states, self.rows, self.scale, out)
        tokens: list[int] = out.tolist()
        return tokens


__all__ = ["DraftHead"]
