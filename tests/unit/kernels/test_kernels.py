"""Compiled functions against the tensor operations that they replace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import AttentionWeights, LatentCache, RowPlaces, attend, remember
from kernels.drafting import join, likeliest
from kernels.experts import mix_experts, swiglu
from kernels.linear import project
from kernels.norm import rms_norm
from kernels.rounded import Rounded
from kernels.routing import GateWeights, route
from kernels.team import DONE, NEXT, PIECES, Desk, attend_together, is_piece
from model.experts.grouped_swiglu import ExpertShard, experts_forward
from model.routing import affinity, gate_values, select_experts

PAGE = 4
LATENT, ROPE, HEAD_IN = 8, 4, 12  # C, R, width of a cache's row


def rand(*shape: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-12), (np.float32, 1e-4)])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_products_and_norm(rows: int, dtype: type, bound: float) -> None:
    x, weight, norm = rand(rows, 24, dtype=dtype), rand(10, 24, dtype=dtype), rand(24, dtype=dtype)
    out = np.empty((rows, 10), dtype)
    project(x, weight, out)
    np.testing.assert_allclose(out, x @ weight.T, rtol=bound, atol=bound)
    normed = np.empty_like(x)
    rms_norm(x, norm, 1e-6, normed)
    reference = torch.nn.functional.rms_norm(torch.from_numpy(x), (24,), torch.from_numpy(norm), 1e-6)
    np.testing.assert_allclose(normed, reference.numpy(), rtol=bound, atol=bound)


def test_state_and_embedding_are_joined() -> None:
    embedding, hidden, weight = rand(9, 8), rand(3, 8), rand(8, 16)
    norms, tokens, out = rand(2, 8), np.array([7, 0, 7]), np.empty((3, 8))
    join(tokens, embedding, norms[0], hidden, norms[1], weight, 1e-6, out)
    halves = [
        values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * norm
        for values, norm in zip((embedding[tokens], hidden), norms, strict=True)
    ]
    np.testing.assert_allclose(out, np.concatenate(halves, 1) @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [7, 192, 7168])
def test_the_likeliest_of_rows_in_8_bits(size: int, dtype: type) -> None:
    """The largest width there is, with sums as close to 32 bits as possible."""
    source = np.random.default_rng(size)
    weight = source.integers(-127, 128, (50, size)).astype(np.int8)
    weight[17], weight[3] = 127, -127
    scale = source.uniform(0.5, 1, 50).astype(dtype)
    scale[17] = scale[3] = 2
    x = np.concatenate((np.ones((1, size)), -np.ones((1, size)), source.standard_normal((7, size))))
    out = np.empty(9, np.int64)
    likeliest(x.astype(dtype), Rounded(weight, scale), out)
    assert out.tolist() == (scale * (x @ weight.T)).argmax(1).tolist()
    assert out[:2].tolist() == [17, 3]


def test_the_likeliest_of_equals_is_the_first() -> None:
    weight, out = np.array([[1, 1], [2, 2], [2, 2]], np.int8), np.empty(3, np.int64)
    likeliest(np.array([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]), Rounded(weight, np.ones(3)), out)
    assert out.tolist() == [1, 0, 0]


@pytest.mark.parametrize("by_bias", [True, False])
@pytest.mark.parametrize(
    ("n_group", "topk_group", "group_experts"), [(1, 1, 1), (4, 2, 2), (4, 2, 3), (8, 3, 1)]
)
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_the_choice_of_experts(
    n_group: int, topk_group: int, group_experts: int, by_bias: bool, shift: float
) -> None:
    """Some biases are so low that a dropped group would win if it were masked with zeros."""
    x, weight, bias = rand(40, 16), rand(32, 16), 0.3 * rand(32) + shift
    idx, gates = np.empty((40, 4), np.int64), np.empty((40, 4))
    gate = GateWeights(
        centroids=weight,
        bias=bias,
        top_k=4,
        n_group=n_group,
        topk_group=topk_group,
        group_experts=group_experts,
        by_bias=by_bias,
        normalize=True,
        factor=2.5,
    )
    route(x, tuple(gate), idx, gates)
    scores = affinity(torch.from_numpy(x), torch.from_numpy(weight))
    chosen = select_experts(
        scores,
        torch.from_numpy(bias),
        top_k=4,
        n_group=n_group,
        topk_group=topk_group,
        group_score="biased" if by_bias else "affinity",
        group_experts=group_experts,
    )
    assert np.array_equal(idx, chosen.numpy())
    expected = gate_values(scores, chosen, normalize=True, factor=2.5)
    np.testing.assert_allclose(gates, expected.numpy(), rtol=1e-12)


def test_of_equal_experts_the_first_is_chosen() -> None:
    idx, gates = np.empty((1, 3), np.int64), np.empty((1, 3))
    route(np.ones((1, 4)), (np.ones((8, 4)), np.zeros(8), 3, 4, 2, 1, True, False, 1.0), idx, gates)
    assert idx.tolist() == [[0, 1, 2]]


@settings(deadline=None)  # the first example compiles
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_experts_of_any_routing(rows: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    width, size, n_experts = 6, 8, 5
    counts = source.integers(0, n_experts + 1, rows)
    row_ptr = np.concatenate(([0], counts.cumsum()))
    expert = np.concatenate([source.permutation(n_experts)[:count] for count in counts]).astype(np.int64)
    gate = source.standard_normal(expert.size)
    x = source.standard_normal((rows, size))
    w13 = source.standard_normal((n_experts, 2 * width, size))
    w2 = source.standard_normal((n_experts, size, width))
    out = np.zeros_like(x)
    mix_experts(x, row_ptr, expert, gate, w13, w2, out)
    expected = np.zeros_like(x)
    for n in range(rows):
        for p in range(row_ptr[n], row_ptr[n + 1]):
            a, u = np.split(w13[expert[p]] @ x[n], 2)
            expected[n] += gate[p] * (w2[expert[p]] @ (a / (1 + np.exp(-a)) * u))
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)


def test_rounded_weights_compute_with_what_they_are_rounded_to() -> None:
    """Every function that takes rounded weights equals itself with the same weights at full width."""

    def pair(*shape: int) -> tuple[Rounded, np.ndarray]:
        rounded = Rounded.of(rand(*shape))
        return rounded, rounded.rows * rounded.scale[..., None]

    def compare(function: Callable[..., None], out: np.ndarray, *weights: tuple[Rounded, np.ndarray]) -> None:
        found, expected = out.copy(), out.copy()
        function(*(one for one, _ in weights), found)
        function(*(one for _, one in weights), expected)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)

    x, norm, row_ptr = rand(3, 16), 1 + 0.1 * rand(16), np.array([0, 2, 4, 6])
    expert, gate = np.array([0, 3, 1, 2, 3, 1]), rand(6)
    compare(lambda a, b, out: swiglu(x, a, b, out), x, pair(12, 16), pair(16, 6))
    compare(
        lambda a, b, out: mix_experts(x, row_ptr, expert, gate, a, b, out),
        x,
        pair(4, 12, 16),
        pair(4, 16, 6),
    )
    tokens, embedding = np.array([2, 0, 2]), rand(5, 16)
    compare(
        lambda a, out: join(tokens, embedding, norm, x, norm, a, 1e-6, out),
        np.empty((3, 16)),
        pair(16, 32),
    )
    cos, sin, at = rand(8, ROPE // 2), rand(8, ROPE // 2, seed=1), np.arange(3)
    latent_norm, none = 1 + 0.1 * rand(LATENT), np.empty((0, 0, 0))
    desk = Desk.of(rows=3, heads=2, width=HEAD_IN, latent=LATENT, pages=1, dtype=np.float64)
    caches, table = np.zeros((1, PAGE, HEAD_IN)), np.zeros((1, 1), np.int64)
    places = tuple(RowPlaces(at, at, np.zeros(3, np.int64), table))

    def weights(down: object, query: object, output: object) -> tuple[object, ...]:
        query_norm = 1 + 0.1 * rand(4)
        fields = AttentionWeights(norm, down, query_norm, query, none, latent_norm, none, output, 1e-6, 2)
        return tuple(fields)

    compare(
        lambda a, out: remember(x, weights(a, none, none), 0, (out[None], cos, sin, PAGE), places),
        np.zeros((PAGE, HEAD_IN)),
        pair(4 + HEAD_IN, 16),
    )
    compare(
        lambda a, b, c, out: attend(
            x, weights(a, b, c), 0, (caches, cos, sin, PAGE), places, tuple(desk), False, out
        ),
        x,
        pair(4 + HEAD_IN, 16),
        pair(2 * HEAD_IN, 4),
        pair(16, 2 * LATENT),
    )


def test_weights_are_rounded_by_less_than_half_a_step() -> None:
    weight = rand(3, 5, 8)
    weight[1, 2] = 0
    found = Rounded.of(weight)
    assert found.rows.dtype == np.int8
    assert (found.rows[1, 2] == 0).all()
    assert np.abs(found.rows).max() == 127
    error = np.abs(found.rows * found.scale[..., None] - weight)
    assert (error <= 0.5001 * found.scale[..., None]).all()


def test_a_row_is_the_same_in_any_company() -> None:
    shard = ExpertShard(torch.randn(8, 12, 16), torch.randn(8, 16, 6))
    rows, gate = torch.randn(7, 16), torch.rand(21)
    expert = torch.stack([torch.randperm(8)[:3] for _ in range(7)]).flatten().int()
    row_ptr = torch.arange(0, 22, 3, dtype=torch.int32)
    together, _ = experts_forward(shard, rows, row_ptr, expert, gate, keep=False)
    for n in range(7):
        pairs = slice(3 * n, 3 * n + 3)
        alone, _ = experts_forward(
            shard, rows[n : n + 1], row_ptr[:2], expert[pairs], gate[pairs], keep=False
        )
        torch.testing.assert_close(alone[0], together[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-11), (np.float32, 2e-4)])
def test_attention(
    merged: bool, compressed: bool, heads: int, shared: bool, dtype: type, bound: float
) -> None:
    """Three sequences of different lengths, one of them with two positions, against plain products."""
    size, rank, nope, v_size = 16, 10 if compressed else 0, 6, 5
    own = HEAD_IN if merged else nope + ROPE
    norm, latent_norm = 1 + 0.1 * rand(size, dtype=dtype), 1 + 0.1 * rand(LATENT, dtype=dtype)
    query_norm = 1 + 0.1 * rand(rank, seed=1, dtype=dtype)
    down = rand(rank + HEAD_IN, size, dtype=dtype)
    query = 0.2 * rand(heads * own, rank or size, dtype=dtype)
    up_key = rand(*((0, 0, 0) if merged else (heads, nope, LATENT)), dtype=dtype)
    up_value = rand(*((0, 0, 0) if merged else (heads, LATENT, v_size)), dtype=dtype)
    back = rand(size, heads * (LATENT if merged else v_size), dtype=dtype)
    cos, sin = np.cos(rand(20, ROPE // 2)).astype(dtype), np.sin(rand(20, ROPE // 2)).astype(dtype)
    cache = np.full((60, HEAD_IN), np.nan, dtype)  # NaN in entries that no row sees
    table = np.array([[3, 1, 0, 0], [5, 4, 2, 7], [6, 8, 0, 0]])
    sequence, position = np.array([0, 1, 2, 2]), np.array([4, 15, 6, 7])
    slot = np.array([table[s, p // PAGE] * PAGE + p % PAGE for s, p in zip(sequence, position, strict=True)])
    for n in range(4):
        for t in range(position[n] + 1):
            cache[table[sequence[n], t // PAGE] * PAGE + t % PAGE] = rand(HEAD_IN, seed=t, dtype=dtype)
    x = rand(4, size, dtype=dtype)
    expected = x.astype(np.float64)
    entries = cache.astype(np.float64)

    def rms(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * weight

    def turn(values: np.ndarray, at: int) -> np.ndarray:
        pairs = values[..., ::2] + 1j * values[..., 1::2]
        turned = pairs * (cos[at] + 1j * sin[at])
        return np.stack((turned.real, turned.imag), -1).reshape(values.shape)

    normed = rms(expected, norm)
    low = normed @ down.T
    queries = ((rms(low[:, :rank], query_norm) if rank else normed) @ query.T).reshape(4, heads, own)
    for n in range(4):
        entry = low[n, rank:]
        entries[slot[n]] = np.concatenate(
            (rms(entry[:LATENT], latent_norm), turn(entry[LATENT:], position[n]))
        )
    for n in range(4):
        seen = [table[sequence[n], t // PAGE] * PAGE + t % PAGE for t in range(position[n] + 1)]
        said = []
        for h in range(heads):
            plain = queries[n, h, :LATENT] if merged else queries[n, h, :nope] @ up_key[h]
            q = np.concatenate((plain, turn(queries[n, h, -ROPE:], position[n])))
            weights = np.exp(entries[seen] @ q - (entries[seen] @ q).max())
            value = weights / weights.sum() @ entries[seen, :LATENT]
            said.append(value if merged else value @ up_value[h])
        expected[n] += back @ np.concatenate(said)
    remembered = cache.copy()
    fields = AttentionWeights(
        norm, down, query_norm, query, up_key, latent_norm, up_value, back, eps=1e-6, heads=heads
    )
    weights, places = tuple(fields), tuple(RowPlaces(position, slot, sequence, table))
    remember(x, weights, 0, tuple(LatentCache(remembered[None], cos, sin, PAGE)), places)
    np.testing.assert_allclose(remembered, entries, rtol=bound, atol=bound)
    desk = Desk.of(rows=4, heads=heads, width=HEAD_IN, latent=LATENT, pages=5, dtype=dtype)
    caches = tuple(LatentCache(cache[None], cos, sin, PAGE))
    attend(x, weights, 0, caches, places, tuple(desk), shared, x)
    np.testing.assert_allclose(x, expected, rtol=bound, atol=bound)
    np.testing.assert_allclose(cache, entries, rtol=bound, atol=bound)


def test_a_number_of_an_earlier_round_is_no_piece_of_a_later_one() -> None:
    """An assistant may lose the core between taking a number and reading what it stands for."""
    desk = Desk.of(rows=3, heads=2, width=HEAD_IN, latent=LATENT, pages=1, dtype=np.float64)
    desk.length[:] = 1
    caches = rand(1, PAGE, HEAD_IN)
    attend_together(desk, caches, 0, 1, PAGE, True)
    stale = int(desk.words[NEXT]) - 1
    assert not is_piece(stale, desk.words[PIECES])
    attend_together(desk, caches, 0, 3, PAGE, True)
    assert desk.words[DONE] == 3
    assert not is_piece(stale, desk.words[PIECES])
    assert is_piece(desk.words[PIECES] - 1, desk.words[PIECES])
