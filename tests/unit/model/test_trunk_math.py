"""Norm, rotation, attention, feed-forward and cross-entropy against plain formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import LatentAttention, attention_by_equations, document_mask
from model.config import ModelConfig
from model.losses.cross_entropy import IGNORE, greedy, linear_cross_entropy
from model.mlp import SwiGLU
from model.moe import Gate
from model.norm import RMSNorm
from model.rope import Rotation, rotation
from support.small_config import SMALL

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE)


def same_with_gradients(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and the gradients of all inputs agree."""
    for tensor in inputs:
        tensor.requires_grad_(True)
    got, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_norm() -> None:
    norm = RMSNorm(7, eps=1e-3)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    same_with_gradients(ours, plain, draw(3, 5, 7), draw(7))
    same_with_gradients(
        lambda x, w: ours(x[..., 2:9], w), lambda x, w: plain(x[..., 2:9], w), draw(4, 9), draw(7)
    )


def test_norm_in_bfloat16_is_computed_in_float32() -> None:
    x = (100 * draw(4, 64)).bfloat16()
    exact = F.rms_norm(x.double(), (64,), eps=1e-6)
    got = RMSNorm(64, eps=1e-6).bfloat16()(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)


def test_feed_forward() -> None:
    def ours(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return torch.func.functional_call(SwiGLU(4, 6), weights, (x,))

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    same_with_gradients(ours, plain, draw(2, 3, 4), draw(6, 4), draw(6, 4), draw(4, 6))


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_turns_pairs(interleave: bool) -> None:
    """Position t turns pair j by t · theta^(-2j/R)."""
    config = ModelConfig(**SMALL, rope_interleave=interleave, rope_theta=100.0)
    x = draw(1, 5, 2, 4)
    turned = x.clone()
    angles = rotation(config, 5, dtype=DOUBLE, device=torch.device("cpu"))
    angles.apply_(turned)
    for j in range(2):
        one, two = (2 * j, 2 * j + 1) if interleave else (j, j + 2)
        for t in range(5):
            angle = t * 100.0 ** (-2 * j / 4)
            a, b = x[0, t, :, one], x[0, t, :, two]
            expected = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
            torch.testing.assert_close((turned[0, t, :, one], turned[0, t, :, two]), expected)
    angles.undo_(turned)
    torch.testing.assert_close(turned, x)


def naive_attention(
    module: LatentAttention, x: Tensor, angles: Rotation, segments: Tensor | None, config: ModelConfig
) -> Tensor:
    """Equations 1-11 of arXiv 2412.19437, one position and one head at a time."""
    batch, length, _ = x.shape
    nope, rope, v_size = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if config.q_lora_rank is None:
        queries = x @ module.q_proj.weight.t()
    else:
        queries = module.q_a_layernorm(x @ module.q_a_proj.weight.t()) @ module.q_b_proj.weight.t()
    down = x @ module.kv_a_proj_with_mqa.weight.t()
    up = module.kv_a_layernorm(down[..., : config.kv_lora_rank]) @ module.kv_b_proj.weight.t()
    k_rope = down[..., None, config.kv_lora_rank :].clone()
    angles.apply_(k_rope)
    heads = []
    for h in range(config.num_attention_heads):
        query = queries[..., h * (nope + rope) : (h + 1) * (nope + rope)]
        q_rope = query[..., None, nope:].clone()
        angles.apply_(q_rope)
        key, value = up[..., h * (nope + v_size) : (h + 1) * (nope + v_size)].split([nope, v_size], -1)
        out = torch.zeros(batch, length, v_size, dtype=x.dtype)
        for b in range(batch):
            for t in range(length):
                seen = [j for j in range(t + 1) if segments is None or bool(segments[b, j] == segments[b, t])]
                logits = key[b, seen] @ query[b, t, :nope] + k_rope[b, seen, 0] @ q_rope[b, t, 0]
                out[b, t] = torch.softmax(logits / math.sqrt(nope + rope), 0) @ value[b, seen]
        heads.append(out)
    return torch.cat(heads, -1) @ module.o_proj.weight.t()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"v_head_dim": 12}, {"rope_interleave": False}, {"qk_nope_head_dim": 5}],
    ids=str,
)
def test_attention(changes: dict[str, Any], packed: bool) -> None:
    config = ModelConfig.model_validate({**SMALL, **changes})
    module = LatentAttention(config).double()
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 1, 1]]) if packed else None
    angles = rotation(config, 6, dtype=DOUBLE, device=torch.device("cpu"))
    mask = None if segments is None else document_mask(segments, DOUBLE)
    x = draw(2, 6, 16)
    with torch.no_grad():
        expected = naive_attention(module, x, angles, segments, config)
        reference = attention_by_equations(module, x, angles, mask)
        torch.testing.assert_close(reference, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module(x, angles, mask), reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_interleave": False}], ids=str)
def test_attention_gradients(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({**SMALL, **changes})
    module = LatentAttention(config).double()
    angles = rotation(config, 4, dtype=DOUBLE, device=torch.device("cpu"))
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        out: Tensor = torch.func.functional_call(module, named, (x, angles, None))
        return out

    inputs = [draw(2, 4, 16), *(p.detach().clone() for p in module.parameters())]
    for tensor in inputs:
        tensor.requires_grad_(True)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("vocabulary", [11, 1 << 17])
def test_cross_entropy(vocabulary: int) -> None:
    """Over one chunk and over several, with positions left out."""
    target = torch.randint(vocabulary, (40,))
    target[[0, 7, 39]] = IGNORE
    same_with_gradients(
        lambda h, w: linear_cross_entropy(h, w, target),
        lambda h, w: F.cross_entropy(h @ w.t(), target, reduction="sum"),
        draw(40, 3),
        draw(vocabulary, 3),
    )


def test_cross_entropy_of_nothing_is_zero() -> None:
    hidden, weight = draw(4, 3).requires_grad_(), draw(5, 3).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_cross_entropy_survives_large_logits() -> None:
    hidden = torch.full((2, 1), 1e4)
    loss = linear_cross_entropy(hidden, torch.tensor([[1.0], [0.5]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(5000)


def test_greedy() -> None:
    hidden, weight = draw(2, 33, 3), draw(1 << 17, 3)
    assert torch.equal(greedy(hidden, weight), (hidden @ weight.t()).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_conversion_narrows_a_gate(dtype: torch.dtype) -> None:
    gate = Gate(4, 3)
    gate.e_score_correction_bias.copy_(torch.tensor([0.1, 1.0001, -3.0, 0.0]))
    before = gate.e_score_correction_bias.clone()
    gate.to(dtype)
    assert gate.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, before)
