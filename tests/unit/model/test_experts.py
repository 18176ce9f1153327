"""The grouped SwiGLU against a loop over tokens and experts, in values and in gradients."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward
from model.experts.local import LocalExperts

HIDDEN, WIDTH, EXPERTS = 6, 5, 7


def make_shard(dtype: torch.dtype = torch.float64, seed: int = 0) -> ExpertShard:
    generator = torch.Generator().manual_seed(seed)
    return ExpertShard(
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator, dtype=dtype),
        torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=dtype),
    )


def make_request(
    pairs_of_row: list[list[int]], dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, row_ptr, local_expert, gate for the experts listed per row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0] + [len(row) for row in pairs_of_row])
    flat = [e for row in pairs_of_row for e in row]
    return (
        torch.randn(len(pairs_of_row), HIDDEN, generator=generator, dtype=dtype),
        lengths.cumsum(0).int(),
        torch.tensor(flat, dtype=torch.int32),
        torch.rand(len(flat), generator=generator, dtype=dtype),
    )


def naive(w13: Tensor, w2: Tensor, rows: Tensor, ptr: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    out = []
    for i, row in enumerate(rows):
        total = torch.zeros_like(row)
        for j in range(int(ptr[i]), int(ptr[i + 1])):
            e = int(expert[j])
            a, up = w13[e, :WIDTH] @ row, w13[e, WIDTH:] @ row
            total = total + gate[j] * (w2[e] @ (F.silu(a) * up))
        out.append(total)
    return torch.stack(out)


routings = st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(routings)
def test_values_and_gradients_match_the_loop(pairs_of_row: list[list[int]]) -> None:
    shard = make_shard()
    rows, ptr, expert, gate = make_request(pairs_of_row)
    leaves = [t.clone().requires_grad_() for t in (shard.w13, shard.w2, rows, gate)]
    w13, w2, x, g = leaves
    expected = naive(w13, w2, x, ptr, expert, g)
    d_partial = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)
    torch.autograd.backward(expected, d_partial)

    partial, saved = experts_forward(shard, rows, ptr, expert, gate, keep=True)
    assert saved is not None
    d_rows, d_gate = experts_backward(shard, saved, d_partial)

    torch.testing.assert_close(partial, expected.detach(), rtol=1e-12, atol=1e-12)
    got = (shard.d_w13, shard.d_w2, d_rows, d_gate)
    for mine, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(routings)
def test_inference_gives_what_training_gives(pairs_of_row: list[list[int]]) -> None:
    shard = make_shard()
    request = make_request(pairs_of_row)
    kept, _ = experts_forward(shard, *request, keep=True)
    alone, saved = experts_forward(shard, *request, keep=False)
    assert saved is None
    torch.testing.assert_close(alone, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_rows_without_pairs_are_zero(keep: bool) -> None:
    shard = make_shard()
    partial, saved = experts_forward(shard, *make_request([[], []]), keep=keep)
    assert torch.equal(partial, torch.zeros(2, HIDDEN, dtype=torch.float64))
    if saved is not None:
        d_rows, d_gate = experts_backward(shard, saved, torch.ones_like(partial))
        assert not d_rows.any() and d_gate.shape == (0,)
    none, _ = experts_forward(shard, *make_request([[]]), keep=keep)
    assert torch.equal(none, torch.zeros(1, HIDDEN, dtype=torch.float64))
    empty, _ = experts_forward(shard, *make_request([]), keep=keep)
    assert empty.shape == (0, HIDDEN)


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    shard = make_shard()
    partial, saved = experts_forward(shard, *make_request([[1, 3], [3]]), keep=True)
    assert saved is not None
    experts_backward(shard, saved, torch.ones_like(partial))
    assert shard.d_w13 is not None and shard.d_w2 is not None
    used = [e for e in range(EXPERTS) if shard.d_w13[e].any() and shard.d_w2[e].any()]
    idle = [e for e in range(EXPERTS) if not shard.d_w13[e].any() and not shard.d_w2[e].any()]
    assert used == [1, 3] and idle == [0, 2, 4, 5, 6]


def test_gradients_add_up_over_backward_passes() -> None:
    once, twice = make_shard(), make_shard()
    for shard, times in ((once, 1), (twice, 2)):
        partial, saved = experts_forward(shard, *make_request([[0, 1], [1, 2]]), keep=True)
        assert saved is not None
        for _ in range(times):
            experts_backward(shard, saved, torch.ones_like(partial))
    assert once.d_w13 is not None and twice.d_w13 is not None
    torch.testing.assert_close(twice.d_w13, 2 * once.d_w13, rtol=1e-12, atol=1e-12)


def test_what_is_saved_outlives_the_request() -> None:
    results = []
    for destroy in (False, True):
        shard = make_shard()
        request = make_request([[0, 1], [4], [1, 6, 2]])
        partial, saved = experts_forward(shard, *request, keep=True)
        assert saved is not None
        if destroy:
            for tensor in request:
                tensor.fill_(3)
        results.append((*experts_backward(shard, saved, torch.ones_like(partial)), shard.d_w13, shard.d_w2))
    for intact, destroyed in zip(*results, strict=True):
        assert torch.equal(intact, destroyed)


def test_a_zero_gate_still_has_a_gradient() -> None:
    shard = make_shard()
    rows, ptr, expert, gate = make_request([[2, 5]])
    gate.zero_()
    _, saved = experts_forward(shard, rows, ptr, expert, gate, keep=True)
    assert saved is not None
    d_rows, d_gate = experts_backward(shard, saved, torch.ones_like(rows))
    assert not d_rows.any()
    assert torch.isfinite(d_gate).all() and d_gate.all()


def test_threads_share_a_shard() -> None:
    requests = [make_request([[i % EXPERTS, (i + 1) % EXPERTS]] * 9, seed=i) for i in range(8)]
    alone, together = make_shard(), make_shard()
    barrier = Barrier(4)

    def work(shard: ExpertShard, mine: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        for request in mine:
            partial, saved = experts_forward(shard, *request, keep=True)
            assert saved is not None
            experts_backward(shard, saved, torch.ones_like(partial))

    def wait_and_work(part: int) -> None:
        barrier.wait()
        work(together, requests[part::4])

    work(alone, requests)
    threads = [Thread(target=wait_and_work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("d_w13", "d_w2"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_stays_itself(dtype: torch.dtype) -> None:
    shard = make_shard(dtype)
    request = make_request([[0, 1], [2, 3, 0], [5]], dtype)
    partial, saved = experts_forward(shard, *request, keep=True)
    assert saved is not None
    d_rows, d_gate = experts_backward(shard, saved, torch.ones_like(partial))
    wide = [t.double() if t.is_floating_point() else t for t in (shard.w13, shard.w2, *request)]
    expected = naive(*wide)
    assert partial.dtype == d_rows.dtype == d_gate.dtype == dtype
    scale = float(expected.abs().max())
    error = float((partial.double() - expected).abs().max()) / scale
    assert error < {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 5e-2}[dtype]


def test_results_repeat_to_the_bit() -> None:
    shard = make_shard(torch.float32)
    request = make_request([[i % 7, (i * 3 + 1) % 7, (i * 5 + 2) % 7] for i in range(50)], torch.float32)
    first, _ = experts_forward(shard, *request, keep=True)
    assert all(torch.equal(first, experts_forward(shard, *request, keep=True)[0]) for _ in range(3))


def local_experts() -> LocalExperts:
    torch.manual_seed(0)
    return LocalExperts(
        [1, 2], n_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, dtype=torch.float64, std=0.5
    )


def test_local_experts_pass_gradcheck() -> None:
    experts = local_experts()
    w13, w2 = experts.weights(2)
    idx = torch.tensor([[0, 3], [3, 1], [6, 3]])
    rows = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, g: Tensor, _13: Tensor, _2: Tensor) -> Tensor:
        return experts.dispatch(2, x, idx, g).combine()

    assert torch.autograd.gradcheck(run, (rows, gates, w13, w2))


def test_local_experts_without_gradients_agree() -> None:
    experts = local_experts()
    rows = torch.randn(4, HIDDEN, dtype=torch.float64)
    idx = torch.tensor([[0, 3], [3, 1], [6, 3], [5, 2]])
    gates = torch.rand(4, 2, dtype=torch.float64)
    trained = experts.dispatch(1, rows, idx, gates).combine()
    with torch.no_grad():
        for n in (1, 4):
            served = experts.dispatch(1, rows[:n], idx[:n], gates[:n]).combine()
            torch.testing.assert_close(served, trained[:n].detach(), rtol=1e-12, atol=1e-12)
        leaf = experts.dispatch(1, rows.clone().requires_grad_(), idx, gates.clone().requires_grad_())
        torch.testing.assert_close(leaf.combine(), trained.detach(), rtol=1e-12, atol=1e-12)
    assert trained.requires_grad
    assert sorted(dict(experts.named_parameters())) == [
        "layers.1.w13",
        "layers.1.w2",
        "layers.2.w13",
        "layers.2.w2",
    ]
