"""SwiGLU networks over a few rows: a dense one, and the routed experts that each row was sent to.

Shapes: N rows, D hidden, E experts, I their intermediate width, nnz (row, expert) pairs.
"""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled_reordered
from kernels.linear import matrix_at, product, shape_of


@compiled_reordered
def swiglu(x, gate_up, down, out):
    """out += down (silu(gate x) * up x): rows [N, D], gate_up [2I, D], down [D, I]; either may be rounded."""
    rows, width = x.shape[0], shape_of(down)[1]
    one = x.dtype.type(1)
    both = np.empty((rows, 2 * width), x.dtype)
    product(x, gate_up, both)
    act = np.empty((rows, width), x.dtype)
    for n in range(rows):
        for i in range(width):
            act[n, i] = both[n, i] / (one + np.exp(-both[n, i])) * both[n, width + i]
    back = np.empty(x.shape, x.dtype)
    product(act, down, back)
    for n in range(rows):
        for k in range(x.shape[1]):
            out[n, k] += back[n, k]


@compiled_reordered
def mix_experts(x, row_ptr, expert, gate, w13, w2, out):
    """out [N, D] += for each row the gate-weighted sum over its experts, in the order of their numbers.

    Args:
        x: [N, D].
        row_ptr: [N + 1], the pairs of row n are row_ptr[n] … row_ptr[n + 1].
        expert: [nnz], indices into the weights.
        gate: [nnz].
        w13: [E, 2I, D], as they are or rounded.
        w2: [E, D, I], as they are or rounded.
    """
    n_experts, size, width = shape_of(w2)
    one = x.dtype.type(1)
    first = np.zeros(n_experts + 1, np.int64)  # where each expert's pairs begin
    for p in range(expert.shape[0]):
        first[expert[p] + 1] += 1
    most = 0
    for e in range(n_experts):
        most = max(most, first[e + 1])
        first[e + 1] += first[e]
    place = first[:-1].copy()
    row = np.empty(expert.shape[0], np.int64)
    of_pair = np.empty(expert.shape[0], x.dtype)
    for n in range(x.shape[0]):
        for p in range(row_ptr[n], row_ptr[n + 1]):
            at = place[expert[p]]
            row[at], of_pair[at] = n, gate[p]
            place[expert[p]] += 1
    inputs = np.empty((most, size), x.dtype)
    both = np.empty((most, 2 * width), x.dtype)
    act = np.empty((most, width), x.dtype)
    back = np.empty((most, size), x.dtype)
    for e in range(n_experts):
        start, m = first[e], first[e + 1] - first[e]
        if m == 0:
            continue
        for i in range(m):
            for k in range(size):
                inputs[i, k] = x[row[start + i], k]
        product(inputs[:m], matrix_at(w13, e), both)
        for i in range(m):
            g = of_pair[start + i]
            for j in range(width):
                act[i, j] = g * both[i, j] / (one + np.exp(-both[i, j])) * both[i, width + j]
        product(act[:m], matrix_at(w2, e), back)
        for i in range(m):
            for k in range(size):
                out[row[start + i], k] += back[i, k]


__all__ = ["mix_experts", "swiglu"]
