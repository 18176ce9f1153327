"""Matrix products of a few rows, each one sweep over the weights, which may be rounded to 8 bits.

A matrix-vector product of BLAS reads several rows of a matrix at a time; one row after the other is what the
memory is fast at. Float32 and float64, in C order.

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
    """`project` with weights as they are, or with a `kernels.rounded.Rounded`."""


@overload(product)
def _product_overload(x, weight, out):
    if isinstance(weight, types.BaseTuple):
        return lambda x, weight, out: _project_rounded(x, weight.rows, weight.scale, out)
    return lambda x, weight, out: project(x, weight, out)


def matrix_at(weights, at):
    """One of several matrices [..., J, K]."""


@overload(matrix_at)
def _matrix_at_overload(weights, at):
    if isinstance(weights, types.BaseTuple):
        return lambda weights, at: Rounded(weights.rows[at], weights.scale[at])
    return lambda weights, at: weights[at]


def shape_of(weights):
    """Of weights [..., J, K]."""


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
    """Rows [N, K] as 16-bit integers, and what each of them is to be multiplied with.

    They have as many bits as keep sums with 8-bit weights within 32: products of such integers are what any
    processor adds up fastest, and next to the weights' error theirs is nothing.
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
    total = np.int32(0)
    for k in range(a.shape[0]):
        total = np.int32(total + np.int32(a[k]) * np.int32(b[k]))
    return total


__all__ = ["dot_rounded", "matrix_at", "product", "project", "round_rows", "shape_of"]
