"""The forward pass of a few rows, each function one sweep over the weights that it needs.

Decoding one token reads every active weight once and does little with it. Some fifty tensor operations a
layer cost more than that, and a matrix-vector product of BLAS reads several rows of a matrix at a time,
where one after the other is what the memory is fast at. Float32 and float64, in C order.

Functions that call one another are in one file on purpose: Numba's cache on disk knows when a function's own
file has changed, and not when that of a function it calls has (see `kernels.atomics`).

Shapes: N rows, D hidden, H heads, C kv_lora_rank, R rotary dimensions, W = C + R width of a cache's row,
Q rank of the queries' compression (0 without), E experts, I their width, K experts per row, S sequences.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from kernels.atomics import add as _add
from kernels.atomics import let_others_run as _let_others_run
from kernels.atomics import load as _load
from kernels.atomics import store as _store
from kernels.rounded import Rounded
from kernels.team import DONE, LAYER, NEXT, PIECES, ROUND

_LATENT_EPS = 1e-6  # as in training, see model.attention
_TINY = 1e-20  # as in model.routing

# Sums may be reordered, so that they vectorise; infinities keep their meaning.
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})


@_compiled
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


def _times(x, weight, out):
    """`project` with weights as they are, or with a `kernels.rounded.Rounded`."""


@overload(_times)
def _times_either(x, weight, out):
    if isinstance(weight, types.BaseTuple):
        return lambda x, weight, out: _project_rounded(x, weight.rows, weight.scale, out)
    return lambda x, weight, out: project(x, weight, out)


def _matrix(weights, at):
    """One of several matrices [..., J, K]."""


@overload(_matrix)
def _matrix_either(weights, at):
    if isinstance(weights, types.BaseTuple):
        return lambda weights, at: Rounded(weights.rows[at], weights.scale[at])
    return lambda weights, at: weights[at]


def _shape(weights):
    """Of weights [..., J, K]."""


@overload(_shape)
def _shape_either(weights):
    if isinstance(weights, types.BaseTuple):
        return lambda weights: weights.rows.shape
    return lambda weights: weights.shape


@_compiled
def _project_rounded(x, weight, scale, out):
    whole, factor = _whole(x)
    for j in range(weight.shape[0]):
        for n in range(x.shape[0]):
            out[n, j] = scale[j] * factor[n] * x.dtype.type(_dot(weight[j], whole[n]))


@_compiled
def _whole(x):
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


@_compiled
def _dot(a, b):
    total = np.int32(0)
    for k in range(a.shape[0]):
        total = np.int32(total + np.int32(a[k]) * np.int32(b[k]))
    return total


@_compiled
def rms_norm(x, weight, eps, out):
    """RMSNorm of x's first columns, as many as there are weights, into `out`."""
    size = weight.shape[0]
    for n in range(x.shape[0]):
        total = x.dtype.type(0)
        for k in range(size):
            total += x[n, k] * x[n, k]
        scale = x.dtype.type(1.0 / np.sqrt(total / size + eps))
        for k in range(size):
            out[n, k] = x[n, k] * scale * weight[k]


@_compiled
def join(tokens, embedding, embedding_norm, hidden, hidden_norm, weight, eps, out):
    """out[n] = weight [RMSNorm(embedding[tokens[n]]); RMSNorm(hidden[n])]: what an MTP module begins with.

    Args:
        tokens: [N].
        embedding: [V, D].
        hidden: [N, D].
        weight: [D, 2D], as it is or rounded.
    """
    rows, size = hidden.shape
    both = np.empty((rows, 2 * size), hidden.dtype)
    for n in range(rows):
        for k in range(size):
            both[n, k] = embedding[tokens[n], k]
    rms_norm(both, embedding_norm, eps, both)
    rms_norm(hidden, hidden_norm, eps, both[:, size:])
    _times(both, weight, out)


@_compiled
def likeliest(x, weight, out):
    """out[n] = the j with the largest <weight[j], x[n]>, of equals the first.

    Args:
        x: [N, D].
        weight: [V, D], a `kernels.rounded.Rounded`.
    """
    whole, _ = _whole(x)
    rows, scale = weight.rows, weight.scale
    best = np.full(x.shape[0], -np.inf, scale.dtype)
    out[:] = 0
    for j in range(rows.shape[0]):
        for n in range(x.shape[0]):
            value = scale[j] * scale.dtype.type(_dot(rows[j], whole[n]))
            if value > best[n]:
                best[n], out[n] = value, j


@_compiled
def swiglu(x, gate_up, down, out):
    """out += down (silu(gate x) * up x): rows [N, D], gate_up [2I, D], down [D, I]; either may be rounded."""
    rows, width = x.shape[0], _shape(down)[1]
    one = x.dtype.type(1)
    both = np.empty((rows, 2 * width), x.dtype)
    _times(x, gate_up, both)
    act = np.empty((rows, width), x.dtype)
    for n in range(rows):
        for i in range(width):
            act[n, i] = both[n, i] / (one + np.exp(-both[n, i])) * both[n, width + i]
    back = np.empty(x.shape, x.dtype)
    _times(act, down, back)
    for n in range(rows):
        for k in range(x.shape[1]):
            out[n, k] += back[n, k]


@_compiled
def route(x, weight, bias, top_k, n_group, topk_group, by_bias, normalize, factor, idx, gates):
    """`model.routing` in one: affinities of rows [N, D], the choice into idx [N, K], gates into gates [N, K].

    Args:
        weight: [E, D].
        bias: [E], for the choice alone.
        by_bias: judge groups by biased scores.
    """
    n_experts = weight.shape[0]
    per_group = n_experts // n_group
    summed = min(max(1, top_k // topk_group), per_group)
    one, none = x.dtype.type(1), x.dtype.type(-np.inf)
    dots = np.empty((x.shape[0], n_experts), x.dtype)
    project(x, weight, dots)
    scores = np.empty(n_experts, x.dtype)
    choice = np.empty(n_experts, x.dtype)
    judged = np.empty(n_experts, x.dtype)
    group = np.empty(n_group, x.dtype)
    for n in range(x.shape[0]):
        for e in range(n_experts):
            scores[e] = one / (one + np.exp(-dots[n, e]))
            choice[e] = scores[e] + bias[e]
        if topk_group < n_group:
            for e in range(n_experts):
                judged[e] = choice[e] if by_bias else scores[e]
            for g in range(n_group):
                group[g] = 0
                for _ in range(summed):
                    best = _best(judged, g * per_group, (g + 1) * per_group)
                    group[g] += judged[best]
                    judged[best] = none
            dropped = np.ones(n_group, np.bool_)
            for _ in range(topk_group):
                best = _best(group, 0, n_group)
                group[best] = none
                dropped[best] = False
            for e in range(n_experts):
                if dropped[e // per_group]:
                    choice[e] = none
        total = x.dtype.type(0)
        for k in range(top_k):
            best = _best(choice, 0, n_experts)
            choice[best] = none
            idx[n, k] = best
            gates[n, k] = scores[best]
            total += scores[best]
        scale = x.dtype.type(factor)
        if normalize:
            scale /= total + x.dtype.type(_TINY)
        for k in range(top_k):
            gates[n, k] *= scale


@_compiled
def _best(values, start, end):
    """Index of the largest of values[start:end]; of equals the first."""
    best = start
    for i in range(start + 1, end):
        if values[i] > values[best]:
            best = i
    return best


@_compiled
def mix_experts(x, row_ptr, expert, gate, w13, w2, out):
    """out [N, D] += for each row the gate-weighted sum over its experts, in the order of their numbers.

    Args:
        x: [N, D].
        row_ptr: [N + 1], the pairs of row n are row_ptr[n] ... row_ptr[n + 1].
        expert: [nnz], indices into the weights.
        gate: [nnz].
        w13: [E, 2I, D], as they are or rounded.
        w2: [E, D, I], likewise.
    """
    n_experts, size, width = _shape(w2)
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
        _times(inputs[:m], _matrix(w13, e), both)
        for i in range(m):
            g = of_pair[start + i]
            for j in range(width):
                act[i, j] = g * both[i, j] / (one + np.exp(-both[i, j])) * both[i, width + j]
        _times(act[:m], _matrix(w2, e), back)
        for i in range(m):
            for k in range(size):
                out[row[start + i], k] += back[i, k]


@_compiled
def attend(
    x, norm, down, query_norm, query, up_key, latent_norm, up_value, back, eps, heads, layer,
    caches, page_size, cos, sin, position, slot, sequence, table, desk, shared, out,
):  # fmt: skip
    """out += latent attention of rows x [N, D] after their norm; their entries go into the cache first.

    Weights as in `engine.weights.LatentProjections`, `up_key` and `up_value` with no heads where merged;
    `down`, `query` and `back` as they are or rounded.

    Args:
        norm: [D].
        layer: whose cache it is.
        caches: [layers, slots, W].
        cos, sin: [positions, R / 2].
        position: [N], which each row sees the cache up to.
        slot: [N], where its entry goes.
        sequence: [N], its row of the table.
        table: [S, P], pages of each sequence.
        desk: a `kernels.team.Desk`.
        shared: let the desk's assistant take a part.
    """
    rows = x.shape[0]
    latent, half = latent_norm.shape[0], cos.shape[1]
    rank = query_norm.shape[0]
    normed = np.empty_like(x)
    rms_norm(x, norm, eps, normed)
    low = np.empty((rows, _shape(down)[0]), x.dtype)
    _times(normed, down, low)
    flat = np.empty((rows, _shape(query)[0]), x.dtype)
    if rank:
        compressed = np.empty((rows, rank), x.dtype)
        rms_norm(low, query_norm, _LATENT_EPS, compressed)
        _times(compressed, query, flat)
    else:
        _times(normed, query, flat)
    queries, seen, cache = desk.queries, desk.seen, caches[layer]
    nope = up_key.shape[1]
    own = flat.shape[1] // heads  # of a head: W where `up_key` is merged
    for n in range(rows):
        c_n, s_n = cos[position[n]], sin[position[n]]
        _enter(low[n], rank, latent_norm, c_n, s_n, cache[slot[n]])
        for h in range(heads):
            if nope:
                for c in range(latent):
                    queries[n, h, c] = 0
                for k in range(nope):
                    for c in range(latent):
                        queries[n, h, c] += flat[n, h * own + k] * up_key[h, k, c]
            else:
                for c in range(latent):
                    queries[n, h, c] = flat[n, h * own + c]
            _turn(flat[n], (h + 1) * own - 2 * half, c_n, s_n, queries[n, h], latent)
        desk.length[n] = position[n] + 1
        for p in range(position[n] // page_size + 1):
            desk.pages[n, p] = table[sequence[n], p]
    _look_together(desk, caches, layer, rows, page_size, shared)
    size = up_value.shape[2]
    if size:
        values = np.empty((rows, heads * size), x.dtype)
        for n in range(rows):
            for h in range(heads):
                for v in range(size):
                    values[n, h * size + v] = 0
                for c in range(latent):
                    for v in range(size):
                        values[n, h * size + v] += seen[n, h, c] * up_value[h, c, v]
        _times(values, back, normed)
    else:
        values = np.empty((rows, heads * latent), x.dtype)
        for n in range(rows):
            for h in range(heads):
                for c in range(latent):
                    values[n, h * latent + c] = seen[n, h, c]
        _times(values, back, normed)
    for n in range(rows):
        for k in range(x.shape[1]):
            out[n, k] += normed[n, k]


@_compiled
def remember(x, norm, down, rank, latent_norm, eps, cache, cos, sin, position, slot):
    """Only the entries that `attend` makes of rows x [N, D], for rows whose states nobody wants.

    Args:
        rank: Q.
        cache: [slots, W], of the layer.
    """
    normed = np.empty_like(x)
    rms_norm(x, norm, eps, normed)
    low = np.empty((x.shape[0], _shape(down)[0] - rank), x.dtype)
    _times(normed, _matrix(down, slice(rank, None)), low)
    for n in range(x.shape[0]):
        _enter(low[n], 0, latent_norm, cos[position[n]], sin[position[n]], cache[slot[n]])


@_compiled
def _enter(low, start, norm, cos, sin, entry):
    """The cache's entry [W] of a position, from its projection [C + R] at `start` of `low`."""
    latent = norm.shape[0]
    total = low.dtype.type(0)
    for c in range(latent):
        total += low[start + c] * low[start + c]
    scale = low.dtype.type(1.0 / np.sqrt(total / latent + _LATENT_EPS))
    for c in range(latent):
        entry[c] = low[start + c] * scale * norm[c]
    _turn(low, start + latent, cos, sin, entry, latent)


@_compiled
def _turn(source, start, cos, sin, target, at):
    """Rotate neighbours of `source` from `start` on into `target` from `at` on."""
    for r in range(cos.shape[0]):
        a, b = source[start + 2 * r], source[start + 2 * r + 1]
        target[at + 2 * r] = a * cos[r] - b * sin[r]
        target[at + 2 * r + 1] = a * sin[r] + b * cos[r]


@_compiled
def _look_together(desk, caches, layer, rows, page_size, shared):
    """All rows' heads look into the cache, two heads a piece of work, which an assistant may help with."""
    pairs = desk.queries.shape[1] // 2
    if not shared:
        for piece in range(rows * pairs):
            _look(desk, caches[layer], page_size, piece // pairs, piece % pairs)
        return
    words = desk.words
    start = (words[PIECES] // ROUND + 1) * ROUND
    words[LAYER] = layer
    _store(words, DONE, 0)
    _store(words, PIECES, start + rows * pairs)
    _store(words, NEXT, start)  # from here on pieces can be taken
    _take_pieces(desk, caches, page_size)
    while _load(words, DONE) != rows * pairs:
        _let_others_run()


@_compiled
def _take_pieces(desk, caches, page_size):
    """Do pieces until all are taken. What a piece is, is read after it was taken: until it is done, nobody
    changes that."""
    words = desk.words
    pairs = desk.queries.shape[1] // 2
    while True:
        taken = _add(words, NEXT, 1)
        if not _is_piece(taken, _load(words, PIECES)):
            return
        piece = taken % ROUND
        _look(desk, caches[words[LAYER]], page_size, piece // pairs, piece % pairs)
        _add(words, DONE, 1)


@_compiled
def _is_piece(number, pieces):
    """Whether a number from `NEXT` is that of a piece of the round that `PIECES` is of."""
    return number // ROUND == pieces // ROUND and number < pieces


@_compiled
def assist(desk, caches, page_size, looks):
    """Take pieces as they come, until none has come for so many looks; whether any has."""
    words = desk.words
    any_came = False
    left = looks
    while left > 0:
        if _is_piece(_load(words, NEXT), _load(words, PIECES)):
            _take_pieces(desk, caches, page_size)
            any_came, left = True, looks
        else:
            left -= 1
            _let_others_run()
    return any_came


@_compiled
def _look(desk, cache, page_size, row, pair):
    """Two heads of one position look at the entries of its sequence: [2, W] to [2, C].

    Pages hold a multiple of four positions, and four are done at a time, which halves what is loaded. In
    place of entries beyond the last, the last one is read again and weighs nothing: what another sequence
    has left there may be no number, which times nothing is none either.
    """
    query, out = desk.queries[row, 2 * pair : 2 * pair + 2], desk.seen[row, 2 * pair : 2 * pair + 2]
    pages, length = desk.pages[row], desk.length[row]
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
    scale_a, scale_b = _exponentiate(weights[0], length), _exponentiate(weights[1], length)
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


@_compiled
def _exponentiate(values, length):
    """Softmax's numerators of values[:length] in place, zeros after them; one over its denominator."""
    top = values[0]
    for t in range(1, length):
        top = max(top, values[t])
    total = values.dtype.type(0)
    if values.itemsize == 8:
        for t in range(length):
            values[t] = np.exp(values[t] - top)
            total += values[t]
    else:
        # exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, as the Cephes library has it: a call of the C library
        # for each value would take longer than the products do.
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


__all__ = [
    "assist",
    "attend",
    "join",
    "likeliest",
    "mix_experts",
    "project",
    "remember",
    "rms_norm",
    "route",
    "swiglu",
]
