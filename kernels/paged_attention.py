"""Attention of two heads of one position over the latent cache, which lies in pages.

Shapes: W width of a cache's row, of which the first C are the latent.
"""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled_reordered


@compiled_reordered
def attend_pair(query, cache, pages, length, page_size, out):
    """Softmax attention of two heads of one position over `length` entries of its sequence (eq. 10).

    Queries come with the scale of the logits in them. Four entries are computed at a time, which halves what
    is loaded. In place of entries beyond the last, the last one is read again with weight 0: memory beyond it
    may hold NaN, and 0 · NaN is NaN.

    Args:
        query: [2, W].
        cache: [slots, W].
        pages: [P] int64, of the sequence.
        page_size: a multiple of four.
        out: [2, C], written.
    """
    width, latent = query.shape[1], out.shape[1]
    zero = query.dtype.type(0)
    weights = np.zeros((2, length + 3), query.dtype)
    for start in range(0, length, page_size):
        base = pages[start // page_size] * page_size
        last = base + min(page_size, length - start) - 1
        for t in range(0, min(page_size, length - start), 4):
            k0, k1 = cache[base + t], cache[min(base + t + 1, last)]
            k2, k3 = cache[min(base + t + 2, last)], cache[min(base + t + 3, last)]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
            for k in range(width):
                a, b = query[0, k], query[1, k]
                a0 += a * k0[k]
                a1 += a * k1[k]
                a2 += a * k2[k]
                a3 += a * k3[k]
                b0 += b * k0[k]
                b1 += b * k1[k]
                b2 += b * k2[k]
                b3 += b * k3[k]
            at = start + t
            weights[0, at], weights[0, at + 1], weights[0, at + 2], weights[0, at + 3] = a0, a1, a2, a3
            weights[1, at], weights[1, at + 1], weights[1, at + 2], weights[1, at + 3] = b0, b1, b2, b3
    scale_a, scale_b = _softmax_numerators(weights[0], length), _softmax_numerators(weights[1], length)
    for c in range(latent):
        out[0, c] = out[1, c] = 0
    for start in range(0, length, page_size):
        base = pages[start // page_size] * page_size
        last = base + min(page_size, length - start) - 1
        for t in range(0, min(page_size, length - start), 4):
            at = start + t
            k0, k1 = cache[base + t], cache[min(base + t + 1, last)]
            k2, k3 = cache[min(base + t + 2, last)], cache[min(base + t + 3, last)]
            a0, a1, a2, a3 = weights[0, at], weights[0, at + 1], weights[0, at + 2], weights[0, at + 3]
            b0, b1, b2, b3 = weights[1, at], weights[1, at + 1], weights[1, at + 2], weights[1, at + 3]
            for k in range(latent):
                out[0, k] += a0 * k0[k] + a1 * k1[k] + a2 * k2[k] + a3 * k3[k]
                out[1, k] += b0 * k0[k] + b1 * k1[k] + b2 * k2[k] + b3 * k3[k]
    for c in range(latent):
        out[0, c] *= scale_a
        out[1, c] *= scale_b


@compiled_reordered
def _softmax_numerators(values, length):
    """Softmax's numerators of values[:length] in place, zeros after them; returns 1 / denominator."""
    top = values[0]
    for t in range(1, length):
        top = max(top, values[t])
    total = values.dtype.type(0)
    if values.itemsize == 8:
        for t in range(length):
            values[t] = np.exp(values[t] - top)
            total += values[t]
    else:
        # exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, by the polynomial of the Cephes library: calling the C
        # library for each value would take longer than the products.
        one, half, lowest = np.float32(1), np.float32(0.5), np.float32(-87)
        for t in range(length):
            x = max(values[t] - top, lowest)
            n = np.floor(x * np.float32(1.44269504) + half)
            r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
            p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
            p = p * r + np.float32(8.3334519073e-3)
            p = p * r + np.float32(4.1665795894e-2)
            p = p * r + np.float32(1.6666665459e-1)
            p = (p * r + half) * r * r + r + one
            power = (np.int32(n) + np.int32(127)) << np.int32(23)
            values[t] = p * np.int32(power).view(np.float32)
            total += values[t]
    for t in range(length, values.shape[0]):
        values[t] = 0
    return values.dtype.type(1) / total


__all__ = ["attend_pair"]
