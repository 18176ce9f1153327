"""Configuration of a model and of its load balance, validated on construction.

The fields of `ModelConfig` carry the names of a Hugging Face DeepSeek-V3 `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import ConfigError
from model.optimizers.schedule import Schedule

_LARGEST = (1 << 31) - 1
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
SizeOrZero = Annotated[int, Field(ge=0, le=_LARGEST)]
Weight = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    """An immutable value with finite numbers, which refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class YarnScaling(_Frozen):
    """`rope_scaling`: YaRN (arXiv 2309.00071) in DeepSeek's form, with `mscale` and `mscale_all_dim`.

    The logits of attention are scaled by mscale(factor, mscale_all_dim)^2, where
    mscale(f, m) = 0.1 m ln f + 1, and cos and sin by mscale(factor, mscale) / mscale(factor, mscale_all_dim)
    (by mscale(factor, 1) when one of the two is 0).
    """

    type: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Size
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    mscale: Weight = 1.0
    mscale_all_dim: Weight = 0.0


class ModelConfig(_Frozen):
    """Shape of a DeepSeek-V3-style model (arXiv 2412.19437, section 2).

    Attributes:
        q_lora_rank: rank of the query's compression; None projects queries directly.
        n_group: groups of experts, the logical nodes of node-limited routing; a property of the model.
        topk_group: groups that one token may use.
        num_nextn_predict_layers: number of multi-token-prediction modules.
        mtp_mode: `chain` (DeepSeek-V3, eq. 21-25) or `parallel` (Gloeckle et al., arXiv 2404.19737).
        group_score: what a group is scored by: the sum of its best `biased` scores, as every released
            checkpoint does, or of its best unbiased `affinity` values, as the paper writes.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Size
    first_k_dense_replace: SizeOrZero = 1
    num_attention_heads: Size
    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: Size
    n_shared_experts: Size = 1
    num_experts_per_tok: Size
    n_group: Size = 1
    topk_group: Size = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 2.5
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = True
    max_position_embeddings: Size = 4096
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    num_nextn_predict_layers: SizeOrZero = 0
    mtp_mode: Literal["chain", "parallel"] = "chain"
    group_score: Literal["biased", "affinity"] = "biased"

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) exceeds num_hidden_layers "
                f"({self.num_hidden_layers}); lower it"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE rotates pairs")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) must be a multiple of n_group ({self.n_group})"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group}); lower topk_group"
            )
        reach = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reach:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {reach} experts that "
                f"topk_group ({self.topk_group}) of n_group ({self.n_group}) groups hold; raise topk_group"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Size of a query's or key's head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of all layers with routed experts, those of MTP modules at the end."""
        last = self.num_hidden_layers + self.num_nextn_predict_layers
        return tuple(range(self.first_k_dense_replace, last))

    @property
    def mtp_layers(self) -> tuple[int, ...]:
        """Layer index of each MTP module, as in Hugging Face names."""
        return tuple(range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers))

    def total_parameters(self) -> int:
        """Parameters of the main model and of the MTP modules, shared ones counted once, biases left out."""
        return self._parameters(self.n_routed_experts, self.num_nextn_predict_layers)

    def active_parameters(self) -> int:
        """Parameters of the main model that one token is multiplied with.

        The head is in; the embedding, a lookup of one row, and the MTP modules are not.
        """
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self._parameters(self.num_experts_per_tok, 0) - lookup

    def _parameters(self, experts: int, modules: int) -> int:
        hidden, heads = self.hidden_size, self.num_attention_heads
        query = heads * self.qk_head_dim
        rank = self.q_lora_rank
        attention = hidden * query if rank is None else rank * (hidden + 1 + query)
        attention += hidden * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        attention += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention += heads * self.v_head_dim * hidden
        block = attention + 2 * hidden
        dense = block + 3 * hidden * self.intermediate_size
        expert = 3 * hidden * self.moe_intermediate_size
        moe = block + self.n_routed_experts * hidden + (experts + self.n_shared_experts) * expert
        join = 2 * hidden * hidden + 2 * hidden if self.mtp_mode == "chain" else 0
        tables = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return (
            tables
            + hidden
            + self.first_k_dense_replace * dense
            + (self.num_hidden_layers - self.first_k_dense_replace) * moe
            + modules * (moe + join + hidden)
        )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json` of a DeepSeek-V3 model.

        Raises:
            ConfigError: it is of another architecture, or asks for what this model does not do.
        """
        for name, expected in _FIXED.items():
            if values.get(name, expected) not in (expected, None):
                raise ConfigError(
                    f"config.json: {name} is {values[name]!r}, but only {expected!r} is supported; "
                    "give a checkpoint of the DeepSeek-V3 architecture"
                )
        heads = values.get("num_attention_heads")
        if values.get("num_key_value_heads") not in (None, heads):
            raise ConfigError(
                f"config.json: num_key_value_heads is {values['num_key_value_heads']!r} beside "
                f"num_attention_heads {heads!r}; multi-head latent attention wants them equal"
            )
        fields = {**_HF_DEFAULTS, **{k: v for k, v in values.items() if k in cls.model_fields}}
        if "num_mtp_layers" in values:
            fields.setdefault("num_nextn_predict_layers", values["num_mtp_layers"])
        # transformers 5 keeps theta and scaling together in rope_parameters.
        rope = _rope(values)
        fields["rope_theta"] = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
        kinds = [kind for kind in (rope.pop("rope_type", None), rope.pop("type", None)) if kind is not None]
        if any(kind not in ("default", "yarn") for kind in kinds):
            raise ConfigError(
                f"config.json: rope scaling of type {kinds} is not supported; only yarn (or none) is"
            )
        fields["rope_scaling"] = None
        if "yarn" in kinds:
            known = {k: v for k, v in rope.items() if k in YarnScaling.model_fields and v is not None}
            fields["rope_scaling"] = {"mscale": 0.0, **known}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors())
            raise ConfigError("config.json: " + "; ".join(lines)) from None

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that transformers reads as `DeepseekV3ForCausalLM`, and `from_hf` as this."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "attention_bias": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_key_value_heads": self.num_attention_heads,
            **self.model_dump(mode="json"),
        }


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling as a `config.json` gives them, in one mapping: empty when it gives none."""
    for name in ("rope_parameters", "rope_scaling"):
        given = values.get(name)
        if not given:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(
                f'config.json: {name} is {given!r}; write a mapping such as {{"type": "yarn", "factor": 40}}'
            )
        return dict(given)
    return {}


_FIXED: dict[str, object] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
# What transformers takes for a field that a config.json leaves out.
_HF_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
}


class DeviceWeights(_Frozen):
    """Weights of DeepSeek-V2's three balance losses (arXiv 2405.04434, section 2.2.3)."""

    expert: Weight = 0.003
    device: Weight = 0.05
    communication: Weight = 0.02


class BalanceConfig(_Frozen):
    """How the load of the routed experts is kept even.

    Attributes:
        strategy: `bias` moves a bias per expert and puts nothing in the loss (arXiv 2408.15664);
            `auxiliary` is the classic loss; `device` DeepSeek-V2's three losses; `none` does nothing.
        update_rate: gamma, by how much a bias moves per optimizer step.
        center_update: subtract the mean from each update of the bias (not in the paper).
        sequence_weight: alpha of the sequence-wise loss (eq. 17 of arXiv 2412.19437), beside any strategy.
        auxiliary_weight: weight of the classic loss under `auxiliary`.
        device_weights: weights of the three losses under `device`.
    """

    strategy: Literal["bias", "auxiliary", "device", "none"] = "bias"
    update_rate: Schedule = 0.001
    center_update: bool = False
    sequence_weight: Schedule = 1e-4
    auxiliary_weight: Schedule = 0.001
    device_weights: DeviceWeights = DeviceWeights()


__all__ = [
    "BalanceConfig",
    "DeviceWeights",
    "ModelConfig",
    "YarnScaling",
]
