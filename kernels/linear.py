"""Matrix products of a few rows, each one sweep over the weights, which may be rounded to 8 bits.

In a matrix-vector product BLAS reads several rows of a matrix at a time. Here rows are read one after the
other, which is the fastest way to read memory. Arrays are float32 or float64, in C order.

Shapes: N rows, K inputs, J outputs.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from kernels.compiled import compiled_reordered
from kernels.rounded import Rounded


@compiled_reordered
def project(x, weight, out):
    """out[n, j] = <weight[j], x[n]>: [N, K] and [J, K] to [N, J]."""
    size = weight.shape[1]
    rows = x.shape[0]
    for j in range(weight.shape[0]):
        n = 0
        while n + 4 <= rows:
            a = b = c = d = x.dtype.type(0)
            for k in range(size):
                w = weight[j, k]
                a += w * x[n, k]
                b += w * x[n + 1, k]
                c += w * x[n + 2, k]
                d += w * x[n + 3, k]
            out[n, j], out[n + 1, j], out[n + 2, j], out[n + 3, j] = a, b, c, d
            n += 4
        while n + 2 <= rows:
            a = b = x.dtype.type(0)
            for k in range(size):
                w = weight[j, k]
                a += w * x[n, k]
                b += w * x[n + 1, k]
            out[n, j], out[n + 1, j] = a, b
            n += 2
        if n < rows:
            a = x.dtype.type(0)
            for k in range(size):
                a += weight[j, k] * x[n, k]
            out[n, j] = a


def product(x, weight, out):
    """`project` for weights as they are or rounded (`kernels.rounded.Rounded`)."""


@overload(product)
def _product_overload(x, weight, out):
    if isinstance(weight, types.BaseTuple):
        return lambda x, weight, out: _project_rounded(x, weight.rows, weight.scale, out)
    return lambda x, weight, out: project(x, weight, out)


def matrix_at(weights, at):
    """Return weights[at] of matrices [..., J, K], as they are or rounded."""


@overload(matrix_at)
def _matrix_at_overload(weights, at):
    if isinstance(weights, types.BaseTuple):
        return lambda weights, at: Rounded(weights.rows[at], weights.scale[at])
    return lambda weights, at: weights[at]


def shape_of(weights):
    """Return the shape of weights [..., J, K], as they are or rounded."""


@overload(shape_of)
def _shape_of_overload(weights):
    if isinstance(weights, types.BaseTuple):
        return lambda weights: weights.rows.shape
    return lambda weights: weights.shape


@compiled_reordered
def _project_rounded(x, weight, scale, out):
    whole, factor = round_rows(x)
    for j in range(weight.shape[0]):
        for n in range(x.shape[0]):
            out[n, j] = scale[j] * factor[n] * x.dtype.type(dot_rounded(weight[j], whole[n]))


@compiled_reordered
def round_rows(x):
    """Round rows [N, K] to 16-bit integers; also return the scale of each row.

    The integers have as many bits as keep sums of their products with 8-bit weights within 32 bits.
    Processors add such products fastest, and the rounding error is small beside that of the weights.
    """
    rows, size = x.shape
    most = x.dtype.type(min(32767, (2**31 - 1) // (127 * size)))
    whole = np.empty((rows, size), np.int16)
    factor = np.empty(rows, x.dtype)
    for n in range(rows):
        top = x.dtype.type(0)
        for k in range(size):
            top = max(top, abs(x[n, k]))
        factor[n] = top / most
        up = most / top if top > 0 else x.dtype.type(0)
        for k in range(size):
            whole[n, k] = np.int16(x[n, k] * up)
    return whole, factor


@compiled_reordered
def dot_rounded(a, b):
    """Dot product of int8 and int16 vectors in 32 bits."""
    total = np.int32(0)
    for k in range(a.shape[0]):
        total = np.int32(total + np.int32(a[k]) * np.int32(b[k]))
    return total


__all__ = ["dot_rounded", "matrix_at", "product", "project", "round_rows", "shape_of"]
