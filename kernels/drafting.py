"""The input of a multi-token-prediction module's block, and the likeliest token of its output.

Shapes: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled_reordered
from kernels.linear import dot_rounded, product, round_rows
from kernels.norm import rms_norm


@compiled_reordered
def join(tokens, embedding, embedding_norm, hidden, hidden_norm, weight, eps, out):
    """out[n] = weight [RMSNorm(embedding[tokens[n]]); RMSNorm(hidden[n])], eq. 21 of arXiv 2412.19437.

    Args:
        tokens: [N].
        embedding: [V, D].
        hidden: [N, D].
        weight: [D, 2D], as it is or rounded.
        eps: Epsilon of both norms.
        out: [N, D], written.
    """
    rows, size = hidden.shape
    both = np.empty((rows, 2 * size), hidden.dtype)
    for n in range(rows):
        for k in range(size):
            both[n, k] = embedding[tokens[n], k]
    rms_norm(both, embedding_norm, eps, both)
    rms_norm(hidden, hidden_norm, eps, both[:, size:])
    product(both, weight, out)


@compiled_reordered
def likeliest(x, weight, out):
    """out[n] = the j with the largest <weight[j], x[n]>, the first of equal ones.

    Args:
        x: [N, D].
        weight: [V, D], a `kernels.rounded.Rounded`.
    """
    whole, _ = round_rows(x)
    rows, scale = weight.rows, weight.scale
    best = np.full(x.shape[0], -np.inf, scale.dtype)
    out[:] = 0
    for j in range(rows.shape[0]):
        for n in range(x.shape[0]):
            value = scale[j] * scale.dtype.type(dot_rounded(rows[j], whole[n]))
            if value > best[n]:
                best[n], out[n] = value, j


__all__ = ["join", "likeliest"]
