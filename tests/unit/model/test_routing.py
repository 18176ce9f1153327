"""The choice of experts against a loop written from the paper, and its guarantees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errors import ConfigError
from model.routing import GroupScore, affinity, gate_values, select_experts


def naive_choice(
    scores: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, group_score: GroupScore
) -> list[list[int]]:
    """Sorting with Python's stable sort, so that ties go to the lower index."""
    chosen = []
    for row in scores.tolist():
        biased = [s + b for s, b in zip(row, bias.tolist(), strict=True)]
        judged = biased if group_score == "biased" else row
        size = len(row) // n_group
        best = max(1, top_k // topk_group)
        strength = [
            sum(sorted(judged[g * size : (g + 1) * size], reverse=True)[:best]) for g in range(n_group)
        ]
        groups = sorted(range(n_group), key=lambda g: -strength[g])[:topk_group]
        candidates = [e for e in range(len(row)) if e // size in groups]
        chosen.append(sorted(candidates, key=lambda e: -biased[e])[:top_k])
    return chosen


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    n_experts = n_group * draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, n_experts // n_group * topk_group))
    # Quarters and their sums are exact in binary; so few values give many ties.
    quarters = st.integers(0, 4).map(lambda q: q / 4)
    scores = draw(
        st.lists(st.lists(quarters, min_size=n_experts, max_size=n_experts), min_size=1, max_size=5)
    )
    bias = draw(st.lists(quarters.map(lambda q: q - 2), min_size=n_experts, max_size=n_experts))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(bias), top_k, n_group, topk_group


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["biased", "affinity"]))
def test_choice_matches_the_loop(case: tuple[Tensor, Tensor, int, int, int], group_score: GroupScore) -> None:
    scores, bias, top_k, n_group, topk_group = case
    idx = select_experts(
        scores, bias, top_k=top_k, n_group=n_group, topk_group=topk_group, group_score=group_score
    )
    assert idx.dtype == torch.int64
    assert idx.tolist() == naive_choice(scores, bias, top_k, n_group, topk_group, group_score)


def test_a_dropped_group_does_not_win_when_the_bias_is_negative() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1]])
    idx = select_experts(scores, torch.full((4,), -5.0), top_k=2, n_group=2, topk_group=1)
    assert idx.tolist() == [[0, 1]]


def test_ties_do_not_depend_on_the_batch() -> None:
    scores = torch.full((300, 64), 0.5)
    idx = select_experts(scores, torch.zeros(64), top_k=6, n_group=8, topk_group=4)
    assert torch.equal(idx, torch.arange(6).expand(300, 6))


def test_the_two_group_scores_differ() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.4]])
    bias = torch.tensor([-1.0, 0.0, 0.0, 0.0])
    args = {"top_k": 1, "n_group": 2, "topk_group": 1}
    assert select_experts(scores, bias, group_score="biased", **args).tolist() == [[2]]
    assert select_experts(scores, bias, group_score="affinity", **args).tolist() == [[1]]


def test_gates_come_from_the_unbiased_scores() -> None:
    scores = torch.rand(5, 8, dtype=torch.float64, requires_grad=True)
    idx = select_experts(scores, torch.linspace(-3, 3, 8), top_k=3)
    assert idx.tolist() != select_experts(scores, torch.zeros(8), top_k=3).tolist()
    raw = gate_values(scores, idx, normalize=False, factor=2.5)
    torch.testing.assert_close(raw, 2.5 * scores.gather(1, idx))
    gates = gate_values(scores, idx, normalize=True, factor=2.5)
    torch.testing.assert_close(gates.sum(1), torch.full((5,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(gates / gates[:, :1], raw / raw[:, :1])
    assert torch.autograd.gradcheck(lambda s: gate_values(s, idx, normalize=True, factor=2.5), scores)


def test_gates_of_vanished_affinities_are_finite() -> None:
    gates = gate_values(torch.zeros(1, 4), torch.tensor([[0, 1]]), normalize=True, factor=1.0)
    assert torch.equal(gates, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_affinity_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    hidden, weight = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    scores = affinity(hidden, weight)
    assert scores.dtype == expected
    torch.testing.assert_close(scores.double(), torch.sigmoid(hidden.double() @ weight.double().T))


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"top_k": 2, "n_group": 3}, "n_group"),
        ({"top_k": 2, "n_group": 2, "topk_group": 3}, "topk_group"),
        ({"top_k": 5, "n_group": 2, "topk_group": 1}, "num_experts_per_tok"),
    ],
)
def test_impossible_groups_are_refused(args: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        select_experts(torch.rand(1, 8), torch.zeros(8), group_score="biased", **args)
