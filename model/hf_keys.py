"""Keys of a Hugging Face DeepSeek-V3 `config.json`, and the fields of `ModelConfig` that they become.

Every key of transformers' DeepseekV3Config either becomes a field, must have the one value that this model
computes, must agree with other keys, or has no effect on what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errors import ConfigError, brief, shown

FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3", "kimi_k2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1.0,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "layer_types": (),
    "per_layer_config": ({},),
    "index_topk": (),
    "mtp_hidden_states_first": (False,),
    "chain_hidden_post_norm": (),
    "logits_mup_width_multiplier": (1.0,),
    "unpadded_vocab_size": (),
}
"""Keys that change what a model computes, and the values that this model computes; null is always one."""

ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
"""Other names of a field's key."""

# What transformers takes for a field that a config.json leaves out, where `ModelConfig` takes another value.
_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
    "num_nextn_predict_layers": 1,
}
# What a null means, where `ModelConfig` has no null.
_NULLS: dict[str, Any] = {
    "n_shared_experts": 0,
    "n_group": 1,
    "norm_topk_prob": False,
    "rope_interleave": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
_ROPE_TYPES = {
    "default": frozenset[str](),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "truncate",
        }
    ),
}  # fmt: skip


def model_fields(values: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config.json gives, or that transformers takes in their place.

    Args:
        values: The file's content.
        known: Names of all fields.

    Raises:
        ConfigError: A key asks for what the model does not compute, or two keys contradict each other.
    """
    _refuse_other_models(values)
    given = dict(values)
    for alias, name in ALIASES.items():
        other = given.pop(alias, None)
        if other is not None and given.setdefault(name, other) != other:
            raise ConfigError(
                f"config.json: {alias} is {brief(other)} and {name} is {brief(given[name])}; both are the "
                "same number: remove one"
            )
    fields = {**_DEFAULTS, **{name: value for name, value in given.items() if name in known}}
    fields |= {name: value for name, value in _NULLS.items() if fields.get(name, value) is None}
    if fields["topk_group"] is None and fields["n_group"] == 1:
        fields["topk_group"] = 1
    _refuse_contradictions(given, fields)
    return {**fields, **_rope_fields(given)}


def _refuse_other_models(values: Mapping[str, Any]) -> None:
    for name, accepted in FIXED.items():
        value = values.get(name)
        if value is None or value in accepted:
            continue
        if name == "layer_types" and isinstance(value, list) and set(map(str, value)) == {"full_attention"}:
            continue
        only = " or ".join(map(repr, accepted)) or "null"
        raise ConfigError(
            f"config.json: {name} is {brief(value)}, but only {only} is supported; "
            "give a checkpoint of the DeepSeek-V3 architecture"
        )


def _refuse_contradictions(given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuse keys that repeat what other keys say, and say something else."""
    heads, nope, rope = (
        fields.get(name) for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    if given.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"config.json: num_key_value_heads is {brief(given['num_key_value_heads'])} beside "
            f"num_attention_heads {brief(heads)}; multi-head latent attention wants them equal"
        )
    if given.get("head_dim") not in (None, rope):
        raise ConfigError(
            f"config.json: head_dim is {brief(given['head_dim'])} beside qk_rope_head_dim {brief(rope)}; in "
            "this architecture it is the size of the rotary part: remove it, or make it equal"
        )
    whole = nope + rope if isinstance(nope, int) and isinstance(rope, int) else None
    if whole is not None and given.get("qk_head_dim") not in (None, whole):
        raise ConfigError(
            f"config.json: qk_head_dim is {brief(given['qk_head_dim'])}, and qk_nope_head_dim ({nope}) + "
            f"qk_rope_head_dim ({rope}) is {whole}: remove it, or make it equal"
        )


def _rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from the two places where a config.json may have them.

    transformers 5 keeps theta and scaling together in `rope_parameters`; it reads `rope_scaling` first.
    """
    name, rope = _rope_mapping(values)
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kinds = [kind for kind in (rope.pop("rope_type", None), rope.pop("type", None)) if kind is not None]
    kind = kinds[0] if kinds else "default"
    if any(not isinstance(k, str) or k not in _ROPE_TYPES for k in kinds) or len(set(kinds)) > 1:
        raise ConfigError(
            f"config.json: rope scaling of type {brief(kinds)} is not supported; only yarn (or none) is"
        )
    if rope.get("partial_rotary_factor") in (None, 1.0):
        rope.pop("partial_rotary_factor", None)
    unknown = sorted(key for key, value in rope.items() if key not in _ROPE_TYPES[kind] and value is not None)
    if unknown:
        raise ConfigError(
            f"config.json: {name} of type {kind!r} has {shown(unknown[0])} ({brief(rope[unknown[0]])}), "
            'which is not supported there; remove it, or correct the type (such as "type": "yarn")'
        )
    scaling = _yarn(rope, values) if kind == "yarn" else None
    return {"rope_theta": theta, "rope_scaling": scaling}


def _rope_mapping(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key that has the rotary settings, and the settings: empty when there are none."""
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name)
        if not given:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"config.json: {name} is {brief(given)}; write a mapping such as "
                '{"type": "yarn", "factor": 40}'
            )
        return name, dict(given)
    return "rope_scaling", {}


def _yarn(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `YarnScaling`, with transformers' meaning of what is null or left out."""
    longest = values.get("max_position_embeddings", 4096)
    span = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    span = longest if span is None else span
    fields = {"mscale": 0.0} | {key: value for key, value in rope.items() if value is not None}
    fields["original_max_position_embeddings"] = span
    if "factor" in rope and rope["factor"] is None and isinstance(longest, int) and isinstance(span, int):
        fields["factor"] = longest / span
    for name in ("beta_fast", "beta_slow"):
        if not fields.get(name):
            fields.pop(name, None)
    if "truncate" in rope and rope["truncate"] is None:
        fields["truncate"] = False
    return fields


__all__ = ["ALIASES", "FIXED", "model_fields"]
