"""Weights rounded to 8 bits, a quarter of the memory to read; for drafts, which are verified."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK = 1 << 20  # number of weights that are rounded at a time


class Rounded(NamedTuple):
    """Matrices [..., J, K] in 8 bits, with a scale for each row.

    Attributes:
        rows: [..., J, K] int8, from -127 to 127.
        scale: [..., J], factor of each row.
    """

    rows: Array
    scale: Array

    @classmethod
    def of(cls, weight: Array) -> Rounded:
        """Round weights [..., J, K] to the nearest."""
        size = weight.shape[-1]
        flat = weight.reshape(-1, size)
        scale = np.empty(len(flat), weight.dtype)
        rows = np.empty(flat.shape, np.int8)
        step = max(1, _BLOCK // size)
        for at in range(0, len(flat), step):
            part = slice(at, at + step)
            scale[part] = np.abs(flat[part]).max(1) / 127
            rows[part] = np.rint(flat[part] / np.where(scale[part] > 0, scale[part], 1)[:, None])
        return cls(rows.reshape(weight.shape), scale.reshape(weight.shape[:-1]))


__all__ = ["Rounded"]
