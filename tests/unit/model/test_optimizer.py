"""The flat AdamW equals torch's AdamW, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from errors import CheckpointError, ProtocolError
from model.optimizers.adamw import AdamW

SHAPES = {"norm": (3,), "matrix": (5, 7), "stack": (4, 3, 5), "bias": (17,), "head": (2, 2)}


def make_tensors(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def fill_gradients(gradients: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for gradient in gradients.values():
        gradient.add_(
            torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.dtype)
        )


def reference_of(tensors: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [t for t in tensors.values() if t.ndim >= 2], "weight_decay": 0.1},
        {"params": [t for t in tensors.values() if t.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_steps_match_torch(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    mine, theirs = make_tensors(dtype), make_tensors(dtype)
    optimizer, reference = AdamW(mine.items()), reference_of(theirs)
    for step in range(12):
        optimizer.zero_grad()
        fill_gradients(optimizer.gradients, step)
        for tensor in theirs.values():
            tensor.grad = torch.zeros_like(tensor)
        fill_gradients({name: t.grad for name, t in theirs.items() if t.grad is not None}, step)
        for tensor in theirs.values():
            assert tensor.grad is not None
            tensor.grad.mul_(scale)
        for group in reference.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step(0.01 / (step + 1), scale)
        reference.step()
    assert optimizer.step_count == 12
    for name in SHAPES:
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance)
        exp_avg, exp_avg_sq = optimizer.moments()[name]
        state = reference.state[theirs[name]]
        torch.testing.assert_close(exp_avg, state["exp_avg"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(exp_avg_sq, state["exp_avg_sq"], rtol=tolerance, atol=tolerance)


def test_a_zero_gradient_still_decays() -> None:
    tensors = make_tensors(torch.float64)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    AdamW(tensors.items(), weight_decay=0.5).step(0.1)
    torch.testing.assert_close(tensors["stack"].detach(), before["stack"] * 0.95)
    assert torch.equal(tensors["norm"].detach(), before["norm"])


def test_autograd_adds_into_the_flat_gradients() -> None:
    tensors = make_tensors(torch.float32)
    optimizer = AdamW(tensors.items())
    for _ in range(2):
        torch.autograd.backward(torch.stack([t.square().sum() for t in tensors.values()]).sum())
    for name, tensor in tensors.items():
        torch.testing.assert_close(optimizer.gradients[name], 4 * tensor.detach())
    optimizer.zero_grad()
    assert not any(g.any() for g in optimizer.gradients.values())
    assert all(t.grad is not None and not t.grad.any() for t in tensors.values())


def test_a_dropped_gradient_is_noticed() -> None:
    tensors = make_tensors(torch.float32)
    optimizer = AdamW(tensors.items())
    tensors["matrix"].grad = None
    with pytest.raises(ProtocolError, match="matrix"):
        optimizer.step(0.1)
    assert optimizer.step_count == 0


def test_plain_tensors_and_mixed_dtypes() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, 2, dtype=torch.float64), "c": torch.ones(5)}
    optimizer = AdamW(tensors.items(), decays=lambda name, tensor: True, weight_decay=0.5)
    optimizer.gradients["b"].fill_(2.0)
    optimizer.step(0.1)
    torch.testing.assert_close(tensors["a"], torch.full((2, 3), 0.95))
    torch.testing.assert_close(tensors["c"], torch.full((5,), 0.95))
    torch.testing.assert_close(tensors["b"], torch.full((4, 2), 0.85, dtype=torch.float64), rtol=1e-7, atol=0)


def test_squared_norm_does_not_depend_on_the_partition() -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    expected = float(gradient.double().square().sum())
    norms = []
    for pieces in (1, 3, 1000):
        tensors = [(str(i), torch.zeros(part.shape)) for i, part in enumerate(gradient.chunk(pieces))]
        optimizer = AdamW(tensors)
        for view, part in zip(optimizer.gradients.values(), gradient.chunk(pieces), strict=True):
            view.copy_(part)
        norms.append(optimizer.squared_norm())
    assert norms == pytest.approx([expected] * 3, rel=1e-13)


def test_moments_carry_a_run_on() -> None:
    straight, resumed = make_tensors(torch.float64), make_tensors(torch.float64)
    first = AdamW(straight.items())
    for step in range(3):
        first.zero_grad()
        fill_gradients(first.gradients, step)
        first.step(0.01)
    saved = {name: (m.clone(), v.clone()) for name, (m, v) in first.moments().items()}
    second = AdamW(resumed.items())
    for name, tensor in resumed.items():
        tensor.data.copy_(straight[name].data)
    second.load_moments(saved, step=first.step_count)
    for optimizer in (first, second):
        optimizer.zero_grad()
        fill_gradients(optimizer.gradients, 3)
        optimizer.step(0.01)
    assert second.step_count == 4
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)


def test_foreign_moments_are_refused() -> None:
    optimizer = AdamW(make_tensors(torch.float32).items())
    moments = {name: (m.clone(), v.clone()) for name, (m, v) in optimizer.moments().items()}
    wrong_shape = {**moments, "head": (torch.zeros(4), torch.zeros(4))}
    with pytest.raises(CheckpointError, match="head"):
        optimizer.load_moments(wrong_shape, step=1)
    with pytest.raises(CheckpointError, match="norm"):
        optimizer.load_moments({name: m for name, m in moments.items() if name != "norm"}, step=1)
