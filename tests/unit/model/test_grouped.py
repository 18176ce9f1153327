"""torch's grouped product against one product for each group."""

from __future__ import annotations

from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from model.experts import grouped_swiglu
from model.experts.grouped_products import InOneKernel, OneByOne, group
from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward

GROUPS, WIDE, NARROW = 5, 16, 8


def sorted_groups(counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))


def in_one_kernel(of_row: Tensor, n_groups: int, **_: object) -> InOneKernel:
    counts = torch.bincount(of_row, minlength=n_groups)
    return InOneKernel(counts.cumsum(0).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 0], [0, 0, 0, 0, 4], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
def test_both_ways_are_the_same(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    of_row = sorted_groups(counts)
    one, other = OneByOne(counts), in_one_kernel(of_row, GROUPS)
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
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.empty(0, dtype=dtype)
        assert group(of_row, GROUPS, like=like, widths=(16, 8)) == OneByOne([2, 0, 1, 0, 0])


def test_experts_are_the_same_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shards = [ExpertShard(torch.randn(4, 2 * NARROW, WIDE), torch.randn(4, WIDE, NARROW)) for _ in range(2)]
    shards[1].w13, shards[1].w2 = shards[0].w13, shards[0].w2
    rows, gate = torch.randn(6, WIDE), torch.rand(12)
    row_ptr, expert = torch.arange(0, 13, 2, dtype=torch.int32), torch.tensor([0, 2] * 6, dtype=torch.int32)
    found = []
    for shard, way in zip(shards, (group, in_one_kernel), strict=True):
        monkeypatch.setattr(grouped_swiglu, "group", way)
        partial, saved = experts_forward(shard, rows, row_ptr, expert, gate, keep=True)
        assert saved is not None
        found.append((partial, *experts_backward(shard, saved, torch.ones(6, WIDE)), shard.d_w13, shard.d_w2))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
