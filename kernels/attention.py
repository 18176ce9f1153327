"""Multi-head latent attention (MLA) of a few rows over the latent cache, section 2.1.1 of arXiv 2412.19437.

The reference is `model.attention`. The cache keeps of each position what keys and values are made of: the
latent c^KV and the rotated key k^R that all heads share. Queries are brought into the latent's space
(q W^UK), and so are the results out of it (W^UV), so that no key or value of a head is ever computed.

Shapes: N rows, D hidden, H heads, C kv_lora_rank, R rotary dimensions, W = C + R width of a cache's row,
Q rank of the queries' compression (0 without), S sequences, P pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.compiled import compiled_reordered
from kernels.constants import LATENT_NORM_EPS
from kernels.linear import matrix_at, product, shape_of
from kernels.norm import rms_norm
from kernels.rounded import Rounded
from kernels.team import Desk, attend_together

Array = npt.NDArray[Any]
Matrix = Array | Rounded


class AttentionWeights(NamedTuple):
    """Weights of one layer's attention, and the norm before it.

    With merged weights `query` contains W^UK and `output` contains W^UV; `up_key` and `up_value` then have
    the shape [0, 0, 0].

    Attributes:
        norm: [D], of the RMSNorm before attention.
        down: [Q + C + R, D], W^DQ above W^DKV above W^KR (eq. 6, 1, 3).
        query_norm: [Q], of the RMSNorm of compressed queries.
        query: [H · (nope + R), Q], W^UQ and W^QR of each head (eq. 7, 8); [H · W, Q] merged. Where Q is 0
            it has D inputs.
        up_key: [H, nope, C], W^UK (eq. 2).
        latent_norm: [C], of the RMSNorm of the latent.
        up_value: [H, C, v], W^UV (eq. 5).
        output: [D, H · v], W^O (eq. 11); [D, H · C] merged.
        eps: epsilon of the norm before attention.
        heads: H.
    """

    norm: Array
    down: Matrix
    query_norm: Array
    query: Matrix
    up_key: Array
    latent_norm: Array
    up_value: Array
    output: Matrix
    eps: float
    heads: int


class LatentCache(NamedTuple):
    """The latent cache of all layers, and the angles of its positions.

    Attributes:
        entries: [layers, slots, W], written and read.
        cos, sin: [positions, R / 2].
        page_size: positions of a page, a multiple of four.
    """

    entries: Array
    cos: Array
    sin: Array
    page_size: int


class RowPlaces(NamedTuple):
    """Where the rows of a step stand in their sequences and in the cache.

    Attributes:
        position: [N] int64, the last position that each row sees, its own.
        slot: [N] int64, where its entry goes.
        sequence: [N] int64, its row of the table.
        table: [S, P] int64, pages of each sequence.
    """

    position: Array
    slot: Array
    sequence: Array
    table: Array


@compiled_reordered
def attend(x, weights, layer, cache, places, desk, shared, out):
    """out += latent attention of rows x [N, D] after their norm; their entries go into the cache first.

    Args:
        weights: an `AttentionWeights` as a plain tuple.
        layer: index of the cache's entries.
        cache: a `LatentCache` as a plain tuple.
        places: a `RowPlaces` as a plain tuple.
        desk: a `kernels.team.Desk` as a plain tuple.
        shared: whether the desk's assistant takes a part of the heads.
    """
    w, c, at = AttentionWeights(*weights), LatentCache(*cache), RowPlaces(*places)
    work = Desk(*desk)
    rows, rank = x.shape[0], w.query_norm.shape[0]
    normed = np.empty_like(x)
    rms_norm(x, w.norm, w.eps, normed)
    low = np.empty((rows, shape_of(w.down)[0]), x.dtype)
    product(normed, w.down, low)
    query = np.empty((rows, shape_of(w.query)[0]), x.dtype)
    if rank:
        compressed = np.empty((rows, rank), x.dtype)
        rms_norm(low, w.query_norm, LATENT_NORM_EPS, compressed)
        product(compressed, w.query, query)
    else:
        product(normed, w.query, query)
    for n in range(rows):
        cos, sin = c.cos[at.position[n]], c.sin[at.position[n]]
        _write_entry(low[n], rank, w.latent_norm, cos, sin, c.entries[layer][at.slot[n]])
        _write_queries(query[n], w.up_key, w.heads, cos, sin, work.queries[n])
        work.length[n] = at.position[n] + 1
        for p in range(at.position[n] // c.page_size + 1):
            work.pages[n, p] = at.table[at.sequence[n], p]
    attend_together(work, c.entries, layer, rows, c.page_size, shared)
    values = _values(work.seen, w.up_value, rows, w.heads, w.latent_norm.shape[0])
    product(values, w.output, normed)
    for n in range(rows):
        for k in range(x.shape[1]):
            out[n, k] += normed[n, k]


@compiled_reordered
def remember(x, weights, layer, cache, places):
    """Write the cache entries of rows x [N, D] as `attend` does, for rows whose output is not needed.

    Args:
        weights, layer, cache, places: as of `attend`.
    """
    w, c, at = AttentionWeights(*weights), LatentCache(*cache), RowPlaces(*places)
    rank = w.query_norm.shape[0]
    normed = np.empty_like(x)
    rms_norm(x, w.norm, w.eps, normed)
    low = np.empty((x.shape[0], shape_of(w.down)[0] - rank), x.dtype)
    product(normed, matrix_at(w.down, slice(rank, None)), low)
    for n in range(x.shape[0]):
        cos, sin = c.cos[at.position[n]], c.sin[at.position[n]]
        _write_entry(low[n], 0, w.latent_norm, cos, sin, c.entries[layer][at.slot[n]])


@compiled_reordered
def _write_entry(low, start, norm, cos, sin, entry):
    """Cache entry [W] of a position: RMSNorm(c^KV) and RoPE(k^R), whose projection begins at low[start]."""
    latent = norm.shape[0]
    total = low.dtype.type(0)
    for c in range(latent):
        total += low[start + c] * low[start + c]
    scale = low.dtype.type(1.0 / np.sqrt(total / latent + LATENT_NORM_EPS))
    for c in range(latent):
        entry[c] = low[start + c] * scale * norm[c]
    _rotate(low, start + latent, cos, sin, entry, latent)


@compiled_reordered
def _write_queries(query, up_key, heads, cos, sin, out):
    """Queries [H, W] of one position in the cache's space: q^C W^UK (or merged) and RoPE(q^R)."""
    own, rotary = query.shape[0] // heads, 2 * cos.shape[0]
    latent, nope = out.shape[1] - rotary, up_key.shape[1]
    for h in range(heads):
        if nope:
            for c in range(latent):
                out[h, c] = 0
            for k in range(nope):
                for c in range(latent):
                    out[h, c] += query[h * own + k] * up_key[h, k, c]
        else:
            for c in range(latent):
                out[h, c] = query[h * own + c]
        _rotate(query, (h + 1) * own - rotary, cos, sin, out[h], latent)


@compiled_reordered
def _values(seen, up_value, rows, heads, latent):
    """What the heads have found, [N, H', C], as inputs of W^O: [N, H · v], or [N, H · C] merged."""
    size = up_value.shape[2]
    if size:
        values = np.empty((rows, heads * size), seen.dtype)
        for n in range(rows):
            for h in range(heads):
                for v in range(size):
                    values[n, h * size + v] = 0
                for c in range(latent):
                    for v in range(size):
                        values[n, h * size + v] += seen[n, h, c] * up_value[h, c, v]
        return values
    values = np.empty((rows, heads * latent), seen.dtype)
    for n in range(rows):
        for h in range(heads):
            for c in range(latent):
                values[n, h * latent + c] = seen[n, h, c]
    return values


@compiled_reordered
def _rotate(source, start, cos, sin, target, at):
    """Rotate pairs of neighbours of `source` from `start` on into `target` from `at` on."""
    for r in range(cos.shape[0]):
        a, b = source[start + 2 * r], source[start + 2 * r + 1]
        target[at + 2 * r] = a * cos[r] - b * sin[r]
        target[at + 2 * r + 1] = a * sin[r] + b * cos[r]


__all__ = ["AttentionWeights", "LatentCache", "Matrix", "RowPlaces", "attend", "remember"]
