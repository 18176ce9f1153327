"""RMSNorm of a few rows (arXiv 1910.07467)."""

from __future__ import annotations

import numpy as np

from kernels.compiled import compiled_reordered


@compiled_reordered
def rms_norm(x, weight, eps, out):
    """Write RMSNorm(x) into `out`, over as many of the first columns as there are weights."""
    size = weight.shape[0]
    for n in range(x.shape[0]):
        total = x.dtype.type(0)
        for k in range(size):
            total += x[n, k] * x[n, k]
        scale = x.dtype.type(1.0 / np.sqrt(total / size + eps))
        for k in range(size):
            out[n, k] = x[n, k] * scale * weight[k]


__all__ = ["rms_norm"]
