"""Compiled latent attention over a cache, with merged weights and without, against the model's equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.weights import LatentProjections
from kernels.attention import AttentionWeights, LatentCache, RowPlaces, attend
from kernels.team import Desk
from model.attention import LatentAttention, attention_by_equations
from model.config import ModelConfig
from model.rope import rotation
from support.small_config import SMALL

PAGE, LENGTH, EPS = 4, 7, 1e-6
APART = {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 4}  # merging would take more products


def array(tensor: torch.Tensor | None) -> np.ndarray:
    empty = torch.empty(0, 0, 0, dtype=torch.float64)
    return (empty if tensor is None else tensor.detach().contiguous()).numpy()


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"rope_interleave": False}, APART],
    ids=str,
)
def test_decoding_computes_the_equations(changes: dict[str, Any]) -> None:
    """All positions of one sequence in one call, whose pages lie in another order."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SMALL, **changes})
    attention = LatentAttention(config).double()
    angles = rotation(config, LENGTH, dtype=torch.float64, device=torch.device("cpu"))
    x = torch.randn(1, LENGTH, config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (config.hidden_size,), eps=EPS)
        expected = attention_by_equations(attention, normed, angles, None)[0]
        folded = LatentProjections.of(attention, config)
    assert (folded.w_uk is not None) == (folded.w_uv is not None) == (changes is APART)
    query_norm = np.empty(0) if folded.query_norm is None else array(folded.query_norm)
    weights = AttentionWeights(
        norm=np.ones(config.hidden_size),
        down=array(folded.down),
        query_norm=query_norm,
        query=array(folded.query),
        up_key=array(folded.w_uk),
        latent_norm=array(folded.latent_norm),
        up_value=array(folded.w_uv),
        output=array(folded.out),
        eps=EPS,
        heads=config.num_attention_heads,
    )
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache = LatentCache(np.full((1, 3 * PAGE, width), np.nan), array(angles.cos), array(angles.sin), PAGE)
    position, table = np.arange(LENGTH), np.array([[2, 0]])
    slot = table[0, position // PAGE] * PAGE + position % PAGE
    places = RowPlaces(position, slot, np.zeros(LENGTH, np.int64), table)
    desk = Desk.of(
        rows=LENGTH,
        heads=config.num_attention_heads,
        width=width,
        latent=config.kv_lora_rank,
        pages=2,
        dtype=np.float64,
    )
    out = np.zeros((LENGTH, config.hidden_size))
    attend(array(x[0]), tuple(weights), 0, tuple(cache), tuple(places), tuple(desk), False, out)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-9, atol=1e-11)
