"""Every key of transformers' DeepseekV3Config means what it means there, or is refused by name."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import RopeParameters

from errors import ConfigError
from model.config import ModelConfig
from model.hf_keys import FIXED
from support.reference_models import TOLERANCE, like, random_reference, random_tokens

WITHOUT_EFFECT = frozenset(
    {
        # What a caller gets back, and how.
        "output_router_logits", "output_hidden_states", "output_attentions", "return_dict", "use_cache",
        "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp", "tie_last_hidden_states",
        # Where a checkpoint comes from, and what else it has.
        "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config",
        "name_or_path", "_name_or_path", "id2label", "label2id", "num_labels", "problem_type",
        # Tokens, which the tokenizer and the generation settings have.
        "bos_token_id", "eos_token_id", "pad_token_id",
        # How DeepSeek trained its models.
        "aux_loss_alpha", "seq_aux", "ep_size",
    }
)  # fmt: skip
"""Known keys that change nothing in the logits."""

ROPE: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}
VALUES: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 6,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "rope_theta": 100.0,
    "rope_scaling": ROPE,
}
OTHER: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 24,
    "output_router_logits": True,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "qk_nope_head_dim": 12,
    "n_group": 8,
    "topk_group": 3,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-2,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 5,
    "eos_token_id": [2, 3],
    "pretraining_tp": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {**ROPE, "rope_theta": 10.0, "factor": 2.0},
    "rope_interleave": False,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "num_mtp_layers": 2,
    # Of every configuration of transformers.
    "transformers_version": "4.0.0",
    "architectures": ["DeepseekV3ForCausalLM"],
    "output_hidden_states": True,
    "return_dict": True,
    "dtype": "float32",
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
    # Read by transformers without being fields.
    "output_attentions": True,
    "name_or_path": "somewhere",
    "num_labels": 3,
    "torch_dtype": "float32",
    "tie_last_hidden_states": True,
    "head_dim": 8,
    "qk_head_dim": 20,
    "num_local_experts": 8,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
    "rope_theta": 10.0,
    "rope_scaling": None,
    "per_layer_config": {"0": {"hidden_act": "gelu"}},
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}
OTHER_ROPE: dict[str, Any] = {
    "rope_theta": 10.0,
    "rope_type": "linear",
    "partial_rotary_factor": 0.5,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.7,
    "beta_fast": 4.0,
    "beta_slow": 0.3,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "mscale": 0.3,
    "mscale_all_dim": 0.5,
    "truncate": False,
    "mrope_section": [2, 3, 3],
}
REFUSED = {
    "num_key_value_heads",
    "num_local_experts",  # beside an n_routed_experts of another value
    "hidden_act",
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "qk_head_dim",
    "partial_rotary_factor",
    "per_layer_config",
    "layer_types",
    "sliding_window",
    "rope_type",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "mrope_section",
}


def with_key(key: str, value: Any) -> dict[str, Any]:
    """A config.json with one more or another key; `rope_parameters` replaces `rope_scaling`."""
    values = {**copy.deepcopy(VALUES), key: copy.deepcopy(value)}
    if key == "rope_parameters":
        del values["rope_scaling"]
    return values


def assert_equal_logits(values: dict[str, Any]) -> None:
    reference = random_reference(values)
    model = like(reference, values)
    tokens = random_tokens(model.config, 2, 24)
    with torch.no_grad():
        got, expected = model(tokens), reference(input_ids=tokens, return_dict=True).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_no_key_is_forgotten() -> None:
    """A key that a new version of transformers adds has no entry here, and fails this test."""
    assert {field.name for field in fields(DeepseekV3Config)} <= OTHER.keys()
    assert RopeParameters.__annotations__.keys() == OTHER_ROPE.keys()


@pytest.mark.parametrize("key", OTHER)
def test_a_key_means_what_it_means_in_transformers(key: str) -> None:
    values = with_key(key, OTHER[key])
    if key in REFUSED:
        with pytest.raises(ConfigError, match=rf"config\.json: .*{key}") as refused:
            ModelConfig.from_hf(values)
        assert "\n" not in str(refused.value)
        return
    unchanged = ModelConfig.from_hf(values) == ModelConfig.from_hf(VALUES)
    assert unchanged == (key in WITHOUT_EFFECT)
    assert_equal_logits(values)


@pytest.mark.parametrize("key", OTHER_ROPE)
def test_a_rope_key_means_what_it_means_in_transformers(key: str) -> None:
    values = with_key("rope_scaling", {**ROPE, key: OTHER_ROPE[key]})
    if key in REFUSED:
        with pytest.raises(ConfigError, match=rf"config\.json: .*({key}|linear)"):
            ModelConfig.from_hf(values)
        return
    assert ModelConfig.from_hf(values) != ModelConfig.from_hf(VALUES)
    assert_equal_logits(values)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {},
        {"rope_type": "default", "rope_theta": 50.0},
        {**ROPE, "mscale": None},
        {**ROPE, "mscale_all_dim": None},
        {**ROPE, "mscale": 0.0, "truncate": None},
        {**ROPE, "beta_fast": None, "beta_slow": None},
        {**ROPE, "beta_fast": 1, "beta_slow": 1},  # as Kimi-K2 has it
        {**ROPE, "factor": 1.0},
        {**ROPE, "factor": None, "mscale_all_dim": None},
        {**ROPE, "attention_factor": 1.3, "mscale_all_dim": None},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "partial_rotary_factor": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_variants(name: str, rope: dict[str, Any] | None) -> None:
    assert_equal_logits(with_key(name, rope))


def test_rope_scaling_goes_before_rope_parameters() -> None:
    assert_equal_logits({**VALUES, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"type": "linear", "factor": 2.0}, r"type \['linear'\] is not supported"),
        ({"rope_type": "dynamic", "factor": 2.0}, r"type \['dynamic'\] is not supported"),
        ({**ROPE, "rope_type": "default"}, r"type \['default', 'yarn'\] is not supported"),
        ({"factor": 40.0}, r"rope_scaling of type 'default' has factor \(40\.0\).*\"type\": \"yarn\""),
        ({**ROPE, "finetuned": 1}, r"rope_scaling of type 'yarn' has finetuned \(1\)"),
        ({**ROPE, "factor": 0.5}, r"rope_scaling\.factor: .*greater than or equal to 1"),
        ({"full_attention": ROPE}, r"has full_attention"),
    ],
)
def test_other_rope_settings_are_refused(rope: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        ModelConfig.from_hf(with_key("rope_scaling", rope))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [field.name for field in fields(DeepseekV3Config)])
def test_a_null_that_transformers_computes_with_is_read_as_there(key: str) -> None:
    values = with_key(key, None)
    try:
        with torch.no_grad():
            random_reference(values)(input_ids=torch.tensor([[1, 2]]))
    except Exception:  # whatever its own code raises
        try:
            ModelConfig.from_hf(values)
        except ConfigError as refused:
            assert key in str(refused)
        return
    assert_equal_logits(values)


@pytest.mark.parametrize("key", sorted(ModelConfig.model_fields.keys() & vars(DeepseekV3Config()).keys()))
def test_a_missing_key_has_the_default_of_transformers(key: str) -> None:
    """Keys without a default here are refused by name."""
    values = {name: value for name, value in {**VALUES, "num_hidden_layers": 4}.items() if name != key}
    try:
        got = ModelConfig.from_hf(values)
    except ConfigError as refused:
        assert f"{key}: Field required" in str(refused)
        return
    assert getattr(got, key) == getattr(DeepseekV3Config(), key)


@pytest.mark.parametrize(
    ("n_group", "topk_group", "top_k"),
    [(4, 2, 2), (4, 1, 2), (4, 1, 3), (4, 1, 4), (8, 4, 4), (8, 2, 4), (2, 1, 4), (4, 4, 4), (1, 1, 3)],
)
def test_groups_are_scored_as_in_transformers(n_group: int, topk_group: int, top_k: int) -> None:
    groups = {"n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": top_k}
    assert_equal_logits({**VALUES, **groups})


def test_contradicting_names_of_one_number_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"num_mtp_layers is 2 and num_nextn_predict_layers is 1.*remove one"
    ):
        ModelConfig.from_hf({**VALUES, "num_mtp_layers": 2, "num_nextn_predict_layers": 1})


@pytest.mark.parametrize("key", FIXED)
def test_a_key_with_one_value_is_refused_with_another(key: str) -> None:
    """Some of these keys are DeepSeek's own, which transformers' class does not have."""
    with pytest.raises(ConfigError, match=rf"config\.json: {key} is 'another', but only .* is supported"):
        ModelConfig.from_hf({**VALUES, key: "another"})
    for value in (None, *FIXED[key]):
        assert ModelConfig.from_hf({**VALUES, key: value}) == ModelConfig.from_hf(VALUES)
