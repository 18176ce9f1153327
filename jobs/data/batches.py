"""The rows of each training step and of each worker.

They are functions of the step alone, so that a resumed run needs no other state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def rows_of_step(step: int, *, n_rows: int, batch_size: int, seed: int) -> Int64s:
    """Row numbers (0-based) of the global batch of a step, int64 [batch_size].

    Every epoch has its own permutation of all rows. A batch may contain the end of one epoch and the start of
    the next.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, n_rows)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _permutation(int(epoch), n_rows, seed)[offsets[here]]
    return rows


def microbatch_rows(rows: Int64s, microbatch_size: int, microbatch: int) -> Int64s:
    """The rows of microbatch number `microbatch` of a global batch."""
    return rows[microbatch * microbatch_size : (microbatch + 1) * microbatch_size]


def microbatches_of_worker(rank: int, workers: int, n_microbatches: int) -> range:
    """Numbers of the microbatches of a step that a worker computes."""
    return range(rank, n_microbatches, workers)


@lru_cache(maxsize=4)
def _permutation(epoch: int, n_rows: int, seed: int) -> Int64s:
    # Raw Philox words are the same in every release of numpy; Generator.permutation may change.
    key = (seed % 2**64) | (epoch << 64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n_rows), kind="stable")
    order.setflags(write=False)
    return order


__all__ = ["microbatch_rows", "microbatches_of_worker", "rows_of_step"]
