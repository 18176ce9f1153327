"""Bias and losses against loops that follow the papers' equations literally."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errors import ConfigError
from model.balance import (
    BatchRouting,
    auxiliary_loss,
    device_losses,
    device_visits,
    expert_load,
    max_violation,
    sequence_balance_loss,
    update_bias,
)

EXPERTS, TOP_K, DEVICES, MAX_DEVICES = 8, 3, 4, 2


def scores_and_choice(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Affinities [*shape, E] in float64, and a choice that is not their top K."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*shape, EXPERTS, generator=generator, dtype=torch.float64)
    idx = torch.rand(*shape, EXPERTS, generator=generator).topk(TOP_K).indices
    return scores.requires_grad_(), idx


def naive_sum(frequency: list[float], share: list[Tensor]) -> Tensor:
    return torch.stack([f * p for f, p in zip(frequency, share, strict=True)]).sum()


def naive_frequency(idx: list[list[int]]) -> list[float]:
    """Eq. 24 of arXiv 2405.04434 and eq. 18 of arXiv 2412.19437."""
    return [EXPERTS / (TOP_K * len(idx)) * sum(i in chosen for chosen in idx) for i in range(EXPERTS)]


def naive_share(scores: Tensor) -> list[Tensor]:
    """Eq. 19 and 20 of arXiv 2412.19437: the mean of the normalised affinities."""
    return [torch.stack([row[i] / row.sum() for row in scores]).mean() for i in range(EXPERTS)]


def naive_sequence_loss(scores: Tensor) -> Tensor:
    """Eq. 17-20 for one sequence [T, E], without α."""
    top = [sorted(range(EXPERTS), key=lambda i: -row[i])[:TOP_K] for row in scores.tolist()]
    return naive_sum(naive_frequency(top), naive_share(scores))


def assert_same_value_and_gradient(mine: Tensor, reference: Tensor, scores: Tensor) -> None:
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    (mine_grad,) = torch.autograd.grad(mine, scores, retain_graph=True)
    (grad,) = torch.autograd.grad(reference, scores, retain_graph=True)
    assert grad.abs().max() > 1e-4
    torch.testing.assert_close(mine_grad, grad, rtol=1e-11, atol=1e-13)


def test_load_counts_tokens_and_skips_padding() -> None:
    idx = torch.tensor([[[0, 1], [1, 2]], [[1, 3], [0, 3]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert expert_load(idx, 5).tolist() == [2, 3, 1, 2, 0]
    assert expert_load(idx, 5, mask).tolist() == [2, 2, 0, 2, 0]
    assert expert_load(idx[:0], 5).tolist() == [0] * 5
    assert expert_load(idx, 5).dtype == torch.int64


def test_bias_moves_by_the_sign_of_the_violation() -> None:
    load = torch.tensor([[4, 4, 4, 4], [9, 4, 2, 1]])
    bias = update_bias(torch.zeros(2, 4), load, 0.5)
    assert bias.tolist() == [[0, 0, 0, 0], [-0.5, 0, 0.5, 0.5]]


def test_bias_tells_apart_loads_that_floats_cannot() -> None:
    load = torch.tensor([2**53 + 1, 2**53, 2**53, 2**53 - 1])
    assert update_bias(torch.zeros(4), load, 1.0).tolist() == [-1, 0, 0, 1]


def test_centred_bias_keeps_its_mean() -> None:
    bias = update_bias(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([13, 1, 1, 1]), 0.5, center=True)
    torch.testing.assert_close(bias, torch.tensor([0.25, 2.25, 3.25, 4.25]))


def test_small_steps_add_up_and_a_narrow_bias_is_refused() -> None:
    bias = torch.full((2,), 0.5)
    for _ in range(100):
        bias = update_bias(bias, torch.tensor([0, 2]), 1e-3)
    torch.testing.assert_close(bias, torch.tensor([0.6, 0.4]))
    with pytest.raises(ConfigError, match="float32"):
        update_bias(bias.bfloat16(), torch.tensor([0, 2]), 1e-3)


def test_max_violation() -> None:
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [6, 2, 4, 4], [0, 0, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 3.0, 0.5, 0.0]


def test_sequence_loss_matches_the_equations() -> None:
    scores, _ = scores_and_choice(3, 11)
    reference = torch.stack([naive_sequence_loss(row) for row in scores]).mean()
    assert_same_value_and_gradient(sequence_balance_loss(scores, top_k=TOP_K), reference, scores)


def test_sequence_loss_leaves_padding_out() -> None:
    scores, _ = scores_and_choice(3, 11)
    lengths = [11, 4, 0]
    mask = torch.arange(11) < torch.tensor(lengths).unsqueeze(1)
    rows = [naive_sequence_loss(row[:n]) for row, n in zip(scores, lengths, strict=True) if n]
    reference = torch.stack(rows).sum() / len(lengths)
    loss = sequence_balance_loss(scores, mask, top_k=TOP_K)
    assert_same_value_and_gradient(loss, reference, scores)
    (grad,) = torch.autograd.grad(loss, scores)
    assert not grad[~mask].any()


def test_auxiliary_loss_matches_the_loop() -> None:
    scores, idx = scores_and_choice(13)
    reference = naive_sum(naive_frequency(idx.tolist()), naive_share(scores))
    assert_same_value_and_gradient(auxiliary_loss(scores, idx), reference, scores)


def test_auxiliary_loss_is_one_under_even_load() -> None:
    scores, _ = scores_and_choice(4)
    idx = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert auxiliary_loss(scores, idx).item() == pytest.approx(1.0)


def naive_device_losses(scores: Tensor, idx: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 23-31 of arXiv 2405.04434, without α."""
    size = EXPERTS // DEVICES
    frequency, share = naive_frequency(idx), naive_share(scores)
    held = [range(d * size, (d + 1) * size) for d in range(DEVICES)]
    mean_frequency = [sum(frequency[j] for j in held[d]) / size for d in range(DEVICES)]
    summed_share = [torch.stack([share[j] for j in held[d]]).sum() for d in range(DEVICES)]
    sent = [
        DEVICES / (MAX_DEVICES * len(idx)) * sum(any(e in held[d] for e in chosen) for chosen in idx)
        for d in range(DEVICES)
    ]
    return naive_sum(frequency, share), naive_sum(mean_frequency, summed_share), naive_sum(sent, summed_share)


@pytest.mark.parametrize("kept", [13, 6])
def test_device_losses_match_the_equations(kept: int) -> None:
    scores, idx = scores_and_choice(13)
    mask = None if kept == 13 else torch.arange(13) < kept
    losses = device_losses(scores, idx, mask, n_devices=DEVICES, max_devices=MAX_DEVICES)
    references = naive_device_losses(scores[:kept], idx[:kept].tolist())
    mine = (losses.expert, losses.device, losses.communication)
    for loss, reference in zip(mine, references, strict=True):
        assert_same_value_and_gradient(loss, reference, scores)


def test_losses_of_parts_add_up_to_the_loss_of_the_batch() -> None:
    """With the counts of the batch, in value and gradient, for parts of any size and with padding."""
    scores, idx = scores_and_choice(13)
    mask = torch.arange(13) % 5 != 4
    visits = device_visits(idx, mask, n_experts=EXPERTS, n_devices=DEVICES)
    batch = BatchRouting(load=expert_load(idx, EXPERTS, mask), visits=visits, n_rows=3)
    devices = {"n_devices": DEVICES, "max_devices": MAX_DEVICES}
    references = (
        naive_sum(naive_frequency(idx[mask].tolist()), naive_share(scores[mask])),
        *naive_device_losses(scores[mask], idx[mask].tolist()),
    )
    totals = [torch.zeros((), dtype=torch.float64)] * 4
    for part in (slice(0, 1), slice(1, 9), slice(9, 13)):
        some = scores[part], idx[part], mask[part]
        losses = device_losses(*some, **devices, batch=batch)
        parts = auxiliary_loss(*some, batch=batch), losses.expert, losses.device, losses.communication
        totals = [total + loss for total, loss in zip(totals, parts, strict=True)]
    for total, reference in zip(totals, references, strict=True):
        assert_same_value_and_gradient(total, reference, scores)


def test_losses_of_no_token_are_zero() -> None:
    scores, idx = scores_and_choice(5)
    mask = torch.zeros(5, dtype=torch.bool)
    assert auxiliary_loss(scores, idx, mask).item() == 0
    assert device_losses(scores, idx, mask, n_devices=4, max_devices=2).communication.item() == 0
    assert sequence_balance_loss(scores.unsqueeze(0), mask.unsqueeze(0), top_k=2).item() == 0


def test_devices_must_divide_the_experts() -> None:
    scores, idx = scores_and_choice(5)
    with pytest.raises(ConfigError, match="n_devices"):
        device_losses(scores, idx, n_devices=3, max_devices=2)
