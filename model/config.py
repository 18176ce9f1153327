"""Configuration of a model and of its load balance, validated on construction.

The fields of `ModelConfig` carry the names of a Hugging Face DeepSeek-V3 `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errors import ConfigError
from model.hf_keys import model_fields
from model.optimizers.schedule import Schedule

_LARGEST = (1 << 31) - 1
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
SizeOrZero = Annotated[int, Field(ge=0, le=_LARGEST)]
# Far above every published model, and small enough that no product of them leaves 63 bits.
Layers = Annotated[int, Field(ge=1, le=1024)]
LayersOrZero = Annotated[int, Field(ge=0, le=1024)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]
HeadDim = Annotated[int, Field(ge=1, le=1 << 14)]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
InnerWidth = Annotated[int, Field(ge=1, le=1 << 24)]
Experts = Annotated[int, Field(ge=1, le=1 << 16)]
SharedExperts = Annotated[int, Field(ge=0, le=1024)]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 24)]
Weight = Annotated[float, Field(ge=0)]
THEIR_SCORED_EXPERTS = 2
"""Number of experts that score a group in released code, transformers and vLLM."""


class _Frozen(BaseModel):
    """An immutable value with finite numbers, which refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class YarnScaling(_Frozen):
    """`rope_scaling`: YaRN (arXiv 2309.00071) in DeepSeek's form, with `mscale` and `mscale_all_dim`.

    The logits of attention are scaled by mscale(factor, mscale_all_dim)^2, where
    mscale(f, m) = 0.1 m ln f + 1, and cos and sin by mscale(factor, mscale) / mscale(factor, mscale_all_dim)
    (by mscale(factor, 1) when one of the two is 0).

    Attributes:
        type: `yarn`, the only scaling.
        factor: how many times longer the context is than the original one.
        original_max_position_embeddings: longest sequence before the scaling.
        beta_fast: rotations over the original context from which on a frequency stays as it is.
        beta_slow: rotations over the original context up to which a frequency is divided by factor.
        mscale: m of the scale of cos and sin.
        mscale_all_dim: m of the scale of the logits.
        attention_factor: factor of cos and sin; null computes it from `mscale` and `mscale_all_dim`.
        truncate: round the bounds of the ramp between the two kinds of dimensions to whole ones.
    """

    type: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Size
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    mscale: Weight = 1.0
    mscale_all_dim: Weight = 0.0
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    truncate: bool = True


class ModelConfig(_Frozen):
    """Shape of a DeepSeek-V3-style model (arXiv 2412.19437, section 2).

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: size of a token's hidden state.
        intermediate_size: inner size of the dense layers' networks.
        moe_intermediate_size: inner size of an expert's network.
        num_hidden_layers: layers of the main model, dense and MoE.
        first_k_dense_replace: how many of the first layers are dense.
        num_attention_heads: heads of attention in a layer.
        q_lora_rank: rank of the query's compression; None projects queries directly.
        kv_lora_rank: rank of the compression of keys and values, which the latent cache holds.
        qk_nope_head_dim: size of the part of a query's or key's head that has no position.
        qk_rope_head_dim: size of the rotary part of a query's or key's head; even.
        v_head_dim: size of a value's head.
        n_routed_experts: routed experts of a MoE layer.
        n_shared_experts: shared experts of a MoE layer, which compute for every token.
        num_experts_per_tok: routed experts that a token uses in a MoE layer.
        n_group: groups of experts, the logical nodes of node-limited routing; a property of the model.
        topk_group: groups that one token may use.
        norm_topk_prob: whether the gate values of a token are divided by their sum.
        routed_scaling_factor: factor of the gate values.
        rms_norm_eps: epsilon of the norms.
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN, for contexts longer than the original one; null for none.
        rope_interleave: whether the rotary part rotates neighbouring pairs, as released weights expect, or
            the two halves.
        max_position_embeddings: longest sequence.
        tie_word_embeddings: whether the head is the embedding.
        initializer_range: standard deviation of random weights.
        num_nextn_predict_layers: number of multi-token-prediction modules.
        mtp_mode: `chain` (DeepSeek-V3, eq. 21-25) or `parallel` (Gloeckle et al., arXiv 2404.19737).
        group_score: what a group is scored by: the sum of its best `biased` scores, as every released
            checkpoint does, or of its best unbiased `affinity` values, as the paper writes.
        group_score_experts: number of best experts that score a group; null takes num_experts_per_tok //
            topk_group, as the paper does. Released code takes 2, and so does a checkpoint that does not say.
    """

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: InnerWidth
    moe_intermediate_size: InnerWidth
    num_hidden_layers: Layers
    first_k_dense_replace: LayersOrZero = 1
    num_attention_heads: Heads
    q_lora_rank: Width | None = None
    kv_lora_rank: Width
    qk_nope_head_dim: HeadDim
    qk_rope_head_dim: HeadDim
    v_head_dim: HeadDim
    n_routed_experts: Experts
    n_shared_experts: SharedExperts = 1
    num_experts_per_tok: Experts
    n_group: Experts = 1
    topk_group: Experts = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 2.5
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = True
    max_position_embeddings: Size = 4096
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    num_nextn_predict_layers: LayersOrZero = 0
    mtp_mode: Literal["chain", "parallel"] = "chain"
    group_score: Literal["biased", "affinity"] = "biased"
    group_score_experts: Experts | None = None

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
        if (self.group_score_experts or 1) > self.experts_per_group:
            raise ValueError(
                f"group_score_experts ({self.group_score_experts}) exceeds the {self.experts_per_group} "
                "experts of a group; lower it"
            )
        return self

    @property
    def experts_per_group(self) -> int:
        """Number of experts in each of the `n_group` groups."""
        return self.n_routed_experts // self.n_group

    @property
    def scored_experts(self) -> int:
        """Number of best experts whose scores are added up to the score of their group."""
        by_paper = min(max(1, self.num_experts_per_tok // self.topk_group), self.experts_per_group)
        return self.group_score_experts or by_paper

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
        fields = model_fields(values, frozenset(cls.model_fields))
        try:
            config = cls.model_validate(fields)
        except ValidationError as error:
            lines = (_problem(details["loc"], details["msg"]) for details in error.errors())
            raise ConfigError("config.json: " + "; ".join(lines)) from None
        return config._as_others_score() if "group_score" not in values else config._simplest()

    def _as_others_score(self) -> ModelConfig:
        """The model with groups scored as all other implementations do: by their best two experts."""
        if self.group_score_experts is not None:
            return self._simplest()
        best = min(THEIR_SCORED_EXPERTS, self.experts_per_group)
        return self.model_copy(update={"group_score_experts": best})._simplest()

    def _simplest(self) -> ModelConfig:
        """The model without a `group_score_experts` that says what its absence says."""
        plain = self.model_copy(update={"group_score_experts": None})
        without_effect = self.topk_group == self.n_group
        return plain if without_effect or plain.scored_experts == self.scored_experts else self

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
            "group_score_experts": self.scored_experts,
        }


class DeviceWeights(_Frozen):
    """Weights of DeepSeek-V2's three balance losses (arXiv 2405.04434, section 2.2.3).

    Attributes:
        expert: weight of the expert-level loss, for experts of even load.
        device: weight of the device-level loss, for groups of even load.
        communication: weight of the communication loss, for groups that equal numbers of tokens go to.
    """

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


def _problem(path: tuple[int | str, ...], message: str) -> str:
    """A problem with its field; fields that contradict each other are named by the message itself."""
    field, text = ".".join(map(str, path)), message.removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


__all__ = [
    "THEIR_SCORED_EXPERTS",
    "BalanceConfig",
    "DeviceWeights",
    "ModelConfig",
    "YarnScaling",
]
