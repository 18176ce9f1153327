"""The model's configuration: refused values, parameter counts, and Hugging Face's config.json."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from errors import ConfigError
from model.causal_lm import CausalLM
from model.config import ModelConfig
from support.small_config import SMALL

V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}

SPAN = {"factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_k_dense_replace": 4}, r"first_k_dense_replace \(4\) exceeds num_hidden_layers \(3\)"),
        ({"qk_rope_head_dim": 5}, r"qk_rope_head_dim \(5\) must be even"),
        ({"n_group": 3}, r"n_routed_experts \(8\) must be a multiple of n_group \(3\)"),
        ({"topk_group": 5}, r"topk_group \(5\) exceeds n_group \(4\)"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) exceeds the 4 experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden": 3}, "hidden\n.*Extra inputs"),
        ({"mtp_mode": "tree"}, "mtp_mode"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**SMALL, **changes})


def test_layers() -> None:
    config = ModelConfig(**SMALL, first_k_dense_replace=1, num_nextn_predict_layers=2)
    assert config.moe_layers == (1, 2, 3, 4)
    assert config.mtp_layers == (3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 2, "mtp_mode": "parallel"},
        {"n_shared_experts": 2, "first_k_dense_replace": 2},
        {"n_shared_experts": 0},
    ],
    ids=str,
)
def test_total_parameters(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({**SMALL, **changes})
    assert config.total_parameters() == sum(p.numel() for p in CausalLM(config).parameters())


def test_parameters_of_deepseek_v3() -> None:
    """671B in all, 37B active (arXiv 2412.19437)."""
    config = ModelConfig(**V3)
    assert round(config.total_parameters() / 1e9) == 671
    assert round(config.active_parameters() / 1e9) == 37


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "group_score": "affinity", "mtp_mode": "parallel"},
        {"rope_scaling": {"factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1}},
        {"rope_scaling": {**SPAN, "attention_factor": 1.5, "truncate": False}},
        {"n_shared_experts": 0, "group_score_experts": 2},
        {"num_experts_per_tok": 4, "group_score_experts": 1},
    ],
    ids=str,
)
def test_hf_round_trip(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate({**SMALL, **changes})
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("keys", "top_k", "expected"),
    [
        ({"group_score": ..., "group_score_experts": ...}, 2, 2),  # another program's, which says nothing
        ({"group_score": ..., "group_score_experts": ...}, 4, 2),
        ({"group_score_experts": ...}, 2, 1),  # one of ours from before there was a number
        ({"group_score_experts": ...}, 4, 2),
        ({"group_score_experts": 1}, 4, 1),
    ],
)
def test_number_of_experts_that_score_a_group(keys: dict[str, Any], top_k: int, expected: int) -> None:
    values = {**ModelConfig.model_validate({**SMALL, "num_experts_per_tok": top_k}).to_hf(), **keys}
    config = ModelConfig.from_hf({name: value for name, value in values.items() if value is not ...})
    assert config.scored_experts == expected
    assert (config.group_score_experts is None) == (expected == top_k // 2)
    assert config.to_hf()["group_score_experts"] == expected


def test_hf_spellings() -> None:
    """transformers 5 keeps the rotary settings together; unknown keys of a config.json are ignored."""
    values = ModelConfig(**SMALL, rope_theta=5.0).to_hf()
    del values["rope_theta"], values["rope_scaling"], values["num_nextn_predict_layers"]
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "num_mtp_layers": 1, "x": 1}
    config = ModelConfig.from_hf(values)
    assert (config.rope_theta, config.rope_scaling, config.num_nextn_predict_layers) == (7.0, None, 1)
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "truncate": True}
    config = ModelConfig.from_hf({**values, "rope_parameters": {**yarn, "rope_theta": 7.0}})
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"n_group": 3}, "n_group"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_hf_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf({**ModelConfig(**SMALL).to_hf(), **changes})
