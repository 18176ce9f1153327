"""Every (token, expert) pair goes to exactly one host and returns to its place."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from channels.base import MAX_MAILBOX_ROWS
from channels.shm.mailbox import ShmMailbox, size_of
from model.dispatch import _sorted, plan_dispatch
from model.experts.grouped_swiglu import ExpertShard, experts_forward

Case = tuple[list[list[int]], list[int], int]
Replicated = tuple[Tensor, Tensor, Tensor, int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """idx, host_of, n_hosts: hosts may own nothing, tokens may crowd one expert."""
    n_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, min(4, n_experts)))
    n_hosts = draw(st.one_of(st.integers(1, n_experts + 2), st.just(1), st.just(n_experts)))
    host_of = draw(st.lists(st.integers(0, n_hosts - 1), min_size=n_experts, max_size=n_experts))
    order = st.permutations(range(n_experts)).map(lambda p: list(p[:top_k]))
    return draw(st.lists(order, max_size=10)), host_of, n_hosts


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, int]:
    idx_list, host_of, n_hosts = case
    idx = torch.tensor(idx_list, dtype=torch.int64) if idx_list else torch.zeros(0, 2, dtype=torch.int64)
    gates = torch.arange(1, idx.numel() + 1, dtype=torch.float64).view(idx.shape) / 7
    return idx, gates, torch.tensor(host_of), n_hosts


@settings(max_examples=150, deadline=None)
@given(cases())
@example(([[2]] * 6, [0, 0, 1, 1], 2))  # all tokens to one expert
@example(([[0, 1], [1, 0]], [2, 2], 4))  # hosts without experts
@example(([[0, 1, 2], [2, 0, 1]], [0, 0, 0], 1))  # one host
@example(([[0, 1, 2], [2, 0, 1]], [2, 0, 1], 3))  # a host per expert
@example(([], [0, 1], 2))  # no tokens
def test_every_pair_exactly_once(case: Case) -> None:
    idx, gates, host_of, n_hosts = tensors(case)
    slices = plan_dispatch(idx, gates, host_of[None], n_hosts)
    assert len(slices) == n_hosts
    seen: list[int] = []
    for host, part in enumerate(slices):
        if part is None:
            assert not (host_of[idx] == host).any()
            continue
        row, ptr = part.row.tolist(), part.row_ptr.tolist()
        assert part.row_ptr.dtype == part.expert.dtype == torch.int32
        assert row == sorted(set(row))
        assert ptr[0] == 0 and ptr[-1] == part.pair.numel() and len(ptr) == len(row) + 1
        for i, token in enumerate(row):
            assert ptr[i] < ptr[i + 1], "a row that no expert wants must not travel"
            for j in range(ptr[i], ptr[i + 1]):
                pair, expert = int(part.pair[j]), int(part.expert[j])
                assert pair // idx.shape[1] == token
                assert int(idx.view(-1)[pair]) == expert and int(host_of[expert]) == host
                assert float(part.gate[j]) == float(gates.view(-1)[pair])
        seen += part.pair.tolist()
    assert sorted(seen) == list(range(idx.numel()))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_hosts_together_compute_what_one_computes(case: Case) -> None:
    idx, gates, host_of, n_hosts = tensors(case)
    n_experts, hidden, width = len(host_of), 4, 3
    generator = torch.Generator().manual_seed(0)
    w13, w2, rows = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n_experts, 2 * width, hidden), (n_experts, hidden, width), (idx.shape[0], hidden))
    )
    total = torch.zeros_like(rows)
    for host, part in enumerate(plan_dispatch(idx, gates, host_of[None], n_hosts)):
        if part is None:
            continue
        owned = (host_of == host).nonzero().view(-1)
        local = torch.full((n_experts,), -1).index_copy_(0, owned, torch.arange(owned.numel()))
        partial, _ = experts_forward(
            ExpertShard(w13[owned], w2[owned]),
            rows[part.row],
            part.row_ptr,
            local[part.expert.long()].int(),
            part.gate,
            keep=False,
        )
        total.index_add_(0, part.row, partial)
    expected = torch.zeros_like(rows)
    for token, experts in enumerate(idx.tolist()):
        for k, e in enumerate(experts):
            a, up = w13[e, :width] @ rows[token], w13[e, width:] @ rows[token]
            expected[token] += gates[token, k] * (w2[e] @ (torch.nn.functional.silu(a) * up))
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


@st.composite
def replicated(draw: st.DrawFn) -> Replicated:
    """idx, gates, host_of [R, E], n_hosts, shift."""
    n_experts = draw(st.integers(1, 10))
    top_k = draw(st.integers(1, min(4, n_experts)))
    n_hosts, ways = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    row = st.lists(st.integers(0, n_hosts - 1), min_size=n_experts, max_size=n_experts)
    host_of = draw(st.lists(row, min_size=ways, max_size=ways))
    order = st.permutations(range(n_experts)).map(lambda p: list(p[:top_k]))
    idx = torch.tensor(draw(st.lists(order, min_size=1, max_size=16)))
    gates = torch.arange(1, idx.numel() + 1, dtype=torch.float64).view(idx.shape) / 7
    return idx, gates, torch.tensor(host_of), n_hosts, draw(st.integers(0, 30000))


@settings(max_examples=150, deadline=None)
@given(replicated())
def test_every_pair_goes_once_to_the_holder_whose_turn_it_is(case: Replicated) -> None:
    idx, gates, host_of, n_hosts, shift = case
    top_k = idx.shape[1]
    slices = plan_dispatch(idx, gates, host_of, n_hosts, shift)
    seen: list[int] = []
    for host, part in enumerate(slices):
        if part is not None:
            seen += part.pair.tolist()
            for pair, expert in zip(part.pair.tolist(), part.expert.tolist(), strict=True):
                assert expert == int(idx.view(-1)[pair])
                assert host == int(host_of[(pair // top_k + shift) % len(host_of), expert])
    assert sorted(seen) == list(range(idx.numel()))
    # Devices other than the CPU, and mailboxes, choose the same.
    way = (torch.arange(len(idx)) + shift) % len(host_of)
    by_sorting = _sorted(idx.view(-1), gates.view(-1), host_of[way[:, None], idx].view(-1), len(idx), n_hosts)
    for one, other in zip(slices, by_sorting, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            for name in ("row", "row_ptr", "expert", "pair", "gate"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
    for host, part in enumerate(slices):
        memory = np.zeros(size_of(2, MAX_MAILBOX_ROWS * top_k, np.dtype(np.float64)), np.uint8)
        box = ShmMailbox(
            memory, 2, MAX_MAILBOX_ROWS * top_k, np.dtype(np.float64), wake=lambda: None, alive=lambda: None
        )
        rows = torch.arange(2.0 * len(idx), dtype=torch.float64).view(-1, 2)
        arrays = (rows.numpy(), idx.numpy(), gates.numpy())
        sent = box.post(*arrays, host_of.numpy(), host, (0, 0, 0), shift)
        assert sent == (0 if part is None else part.row.numel())
        if part is not None:
            assert box._box.rows[:sent].tolist() == rows[part.row].tolist()
            assert box._box.row_ptr[: sent + 1].tolist() == part.row_ptr.tolist()
            assert box._box.expert[: part.expert.numel()].tolist() == part.expert.tolist()
            assert box._box.gate[: part.expert.numel()].tolist() == part.gate.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 5000), st.integers(1, 40))
def test_replicas_share_the_load_evenly(ways: int, shift: int, n: int) -> None:
    idx = torch.zeros(n, 1, dtype=torch.int64)  # all tokens want one expert
    slices = plan_dispatch(idx, torch.ones(n, 1), torch.arange(ways)[:, None], ways, shift)
    rows = [0 if part is None else part.row.numel() for part in slices]
    assert sum(rows) == n
    assert max(rows) - min(rows) <= 1


def test_gates_carry_no_gradient() -> None:
    gates = torch.rand(2, 2, requires_grad=True)
    for n_hosts in (1, 2):
        part = plan_dispatch(torch.tensor([[0, 1], [1, 0]]), gates, torch.tensor([[0, 0]]), n_hosts)[0]
        assert part is not None and not part.gate.requires_grad
