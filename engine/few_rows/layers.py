"""The weights of blocks and MTP modules as arrays, in the form that compiled functions take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from torch import Tensor

from engine.weights import LayerWeights, RoutedWeights, SwiGLUWeights
from kernels.attention import AttentionWeights, Matrix
from kernels.rounded import Rounded
from kernels.routing import GateWeights
from model.config import ModelConfig
from model.experts.local import LocalExperts
from model.experts.protocols import Experts

Array = npt.NDArray[Any]
Fields = tuple[Any, ...]
"""A NamedTuple of `kernels` as a plain tuple, whose type Numba determines faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsLayer:
    """The weights of a transformer block.

    Attributes:
        index: Model layer index.
        attention: The fields of an `AttentionWeights`.
        mlp_norm: [D], the norm before the feed-forward part.
        gate: The fields of a `GateWeights`; None in a dense block.
        gate_up: [2I, D] of the shared expert, or of the network of a dense block.
        down: [D, I] of the same network.
        experts: w13 and w2 of the routed experts if they are computed here and not dispatched.
    """

    index: int
    attention: Fields
    mlp_norm: Array
    gate: Fields | None
    gate_up: Matrix
    down: Matrix
    experts: tuple[Rounded, Rounded] | None

    @classmethod
    def of(cls, layer: LayerWeights, config: ModelConfig) -> FewRowsLayer:
        """The block with its weights unchanged."""
        return cls._of(layer, config, as_array, None)

    @classmethod
    def rounded(cls, layer: LayerWeights, config: ModelConfig, experts: Experts) -> FewRowsLayer:
        """The block in 8 bits, including its routed experts if they are in this process."""
        routed = None
        if layer.routed is not None and isinstance(experts, LocalExperts):
            w13, w2 = experts.weights(layer.index)
            routed = as_rounded(w13), as_rounded(w2)
        return cls._of(layer, config, as_rounded, routed)

    @classmethod
    def _of(
        cls,
        layer: LayerWeights,
        config: ModelConfig,
        matrix: Callable[[Tensor], Matrix],
        experts: tuple[Rounded, Rounded] | None,
    ) -> FewRowsLayer:
        routed = layer.routed
        mlp: SwiGLUWeights | None = layer.mlp if routed is None else routed.shared
        assert mlp is not None
        return cls(
            index=layer.index,
            attention=_attention(layer, config, matrix),
            mlp_norm=as_array(layer.mlp_norm),
            gate=None if routed is None else _gate(routed, config),
            gate_up=matrix(mlp.gate_up),
            down=matrix(mlp.down),
            experts=experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsModule:
    """The weights of an MTP module; norms before the join, and the join, are None in `parallel` mode."""

    layer: FewRowsLayer
    norm: Array
    embedding_norm: Array | None
    hidden_norm: Array | None
    join: Rounded | None


def _attention(layer: LayerWeights, config: ModelConfig, matrix: Callable[[Tensor], Matrix]) -> Fields:
    weights = layer.attention
    none = weights.down.new_empty(0, 0, 0)
    fields = AttentionWeights(
        norm=as_array(layer.attention_norm),
        down=matrix(weights.down),
        query_norm=as_array(none.flatten() if weights.query_norm is None else weights.query_norm),
        query=matrix(weights.query),
        up_key=as_array(none if weights.w_uk is None else weights.w_uk),
        latent_norm=as_array(weights.latent_norm),
        up_value=as_array(none if weights.w_uv is None else weights.w_uv),
        output=matrix(weights.out),
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
    )
    return tuple(fields)


def _gate(routed: RoutedWeights, config: ModelConfig) -> Fields:
    fields = GateWeights(
        centroids=as_array(routed.weight),
        bias=as_array(routed.bias),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        group_experts=config.scored_experts,
        by_bias=config.group_score == "biased",
        normalize=config.norm_topk_prob,
        factor=config.routed_scaling_factor,
    )
    return tuple(fields)


def as_array(tensor: Tensor) -> Array:
    """A tensor in CPU memory as a contiguous array."""
    array: Array = tensor.detach().contiguous().numpy()
    return array


def as_rounded(tensor: Tensor) -> Rounded:
    """A matrix rounded to 8 bits."""
    return Rounded.of(as_array(tensor))


__all__ = ["Array", "FewRowsLayer", "FewRowsModule", "Fields", "as_array", "as_rounded"]
