"""torch's grouped product against one product for each group, and the experts on a GPU that is not there."""

from __future__ import annotations

from threading import Lock
from typing import Any

import pytest
import torch
from accelerator import accelerator
from torch import Tensor

import model.experts
from model.experts import ExpertShard, LocalExperts, experts_backward, experts_forward
from model.grouped import InOneKernel, OneByOne, group

GROUPS, WIDE, NARROW = 5, 16, 8


def sorted_groups(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))


def in_one_kernel(of_row: Tensor, n_groups: int, like: Tensor) -> InOneKernel:
    counts = torch.bincount(of_row, minlength=n_groups)
    return InOneKernel(counts.cumsum(0).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 0], [0, 0, 0, 0, 4], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
def test_both_ways_are_the_same(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    of_row = sorted_groups(counts)
    one, other = OneByOne(counts), in_one_kernel(of_row, GROUPS, torch.empty(0))
    x, y = torch.randn(sum(counts), WIDE).to(dtype), torch.randn(sum(counts), NARROW).to(dtype)
    weights = torch.randn(GROUPS, WIDE, NARROW).to(dtype)
    precise = dtype == torch.float32
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if precise else {"rtol": 0.02, "atol": 0.1}
    mine = one.multiply(x, weights, memory=torch.empty_like(y))
    torch.testing.assert_close(other.multiply(x, weights, memory=torch.empty_like(y)), mine, **close)
    totals = [torch.ones(GROUPS, WIDE, NARROW), torch.ones(GROUPS, WIDE, NARROW)]
    for groups, total in zip((one, other), totals, strict=True):
        groups.add_outer(total, x, y, Lock())
    torch.testing.assert_close(totals[0], totals[1], **close)


def test_which_way_is_taken() -> None:
    of_row = sorted_groups([2, 0, 1, 0, 0])
    assert group(of_row, GROUPS, torch.empty(0)) == OneByOne([2, 0, 1, 0, 0])
    with accelerator() as gpu:
        here, there = torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64, device=gpu)
        for of_rows in (here, there):
            groups = group(of_rows, GROUPS, torch.empty(0, device=gpu))
            assert isinstance(groups, InOneKernel) and groups.ends.device.type == gpu.type


def test_experts_are_the_same_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shards = [ExpertShard(torch.randn(4, 2 * NARROW, WIDE), torch.randn(4, WIDE, NARROW)) for _ in range(2)]
    shards[1].w13, shards[1].w2 = shards[0].w13, shards[0].w2
    rows, gate = torch.randn(6, WIDE), torch.rand(12)
    row_ptr, expert = torch.arange(0, 13, 2, dtype=torch.int32), torch.tensor([0, 2] * 6, dtype=torch.int32)
    found = []
    for shard, way in zip(shards, (group, in_one_kernel), strict=True):
        monkeypatch.setattr(model.experts, "group", way)
        partial, saved = experts_forward(shard, rows, row_ptr, expert, gate, keep=True)
        assert saved is not None
        found.append((partial, *experts_backward(shard, saved, torch.ones(6, WIDE)), shard.d_w13, shard.d_w2))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indices_there", [False, True])
def test_experts_on_a_gpu_wait_for_nothing(indices_there: bool) -> None:
    with accelerator() as gpu:
        shard = ExpertShard(
            torch.empty(4, 2 * NARROW, WIDE, device=gpu, dtype=torch.bfloat16),
            torch.empty(4, WIDE, NARROW, device=gpu, dtype=torch.bfloat16),
            torch.zeros(4, 2 * NARROW, WIDE, device=gpu),
            torch.zeros(4, WIDE, NARROW, device=gpu),
        )
        row_ptr = torch.zeros(7, dtype=torch.int32, device=gpu if indices_there else "cpu")
        expert = torch.zeros(12, dtype=torch.int32, device=row_ptr.device)
        rows = torch.empty(6, WIDE, device=gpu, dtype=torch.bfloat16)
        partial, saved = experts_forward(shard, rows, row_ptr, expert, torch.empty(12, device=gpu), keep=True)
        assert saved is not None
        d_rows, d_gate = experts_backward(shard, saved, partial)
        for made in (partial, d_rows, d_gate):
            assert made.device.type == gpu.type and made.dtype == torch.bfloat16


@pytest.mark.parametrize("trains", [False, True])
def test_experts_in_process_on_a_gpu(trains: bool) -> None:
    with accelerator() as gpu, torch.device(gpu), torch.set_grad_enabled(trains):
        experts = LocalExperts(
            [1], n_experts=4, hidden_size=WIDE, intermediate_size=NARROW, dtype=torch.bfloat16
        )
        rows = torch.empty(6, WIDE, dtype=torch.bfloat16, requires_grad=trains)
        idx = torch.zeros(6, 2, dtype=torch.int64)
        out = experts.dispatch(1, rows, idx, torch.empty(6, 2, requires_grad=trains)).combine()
        assert out.device.type == gpu.type
        if trains:
            out.sum().backward()  # type: ignore[no-untyped-call]
            assert rows.grad is not None and rows.grad.device.type == gpu.type
