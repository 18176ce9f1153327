"""The trunk's weights in the form used for inference: merged products, and attention in the latent space.

A key is W_uk c + rope part and a value is W_uv c, with the compressed c in the cache. Hence
q · (W_uk c) = (W_uk' q) · c and Σ p W_uv c = W_uv Σ p c (section 2.1.2 of arXiv 2405.04434): queries are
projected to the latent space, all heads attend to the rows of the cache, and no key or value is computed.

Shapes: D hidden, H heads, C kv_lora_rank, R rotary dimensions, Q input of the queries (q_lora_rank or D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import LatentAttention
from model.block import Block
from model.config import ModelConfig
from model.mlp import SwiGLU
from model.moe import MoE
from model.mtp import MTPModule
from model.transformer import Transformer

_WORTH = 2.0  # two factors are merged if the product has at most this many times their elements


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiGLUWeights:
    """A SwiGLU network whose gate and up projections are one matrix: gate_up [2I, D] and down [D, I]."""

    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, mlp: SwiGLU) -> SwiGLUWeights:
        """The weights of a module."""
        return cls(
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach(),
            down=mlp.down_proj.weight.detach(),
        )

    @classmethod
    def zero(cls, like: Tensor) -> SwiGLUWeights:
        """A network of width one that maps [N, D] to zeros.

        Args:
            like: [..., D], whose dtype and device the weights have.
        """
        size = like.shape[-1]
        return cls(gate_up=like.new_zeros(2, size).detach(), down=like.new_zeros(size, 1).detach())

    def __call__(self, rows: Tensor) -> Tensor:
        """The network applied to rows [N, D]: [N, D]."""
        gate, up = F.linear(rows, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentProjections:
    """The projections of one layer's attention.

    Attributes:
        down: [Q + C + R, D], or [C + R, D] where queries are projected directly.
        query_norm: [Q]; None where queries are projected directly.
        latent_norm: [C].
        query: [H·(C + R), Q] with W_uk merged in, or [H·(nope + R), Q] without; times the attention's scale.
        w_uk: [H, nope, C]; None where it is merged into `query`.
        out: [D, H·C] with W_uv merged in, or [D, H·v] without.
        w_uv: [H, C, v]; None where it is merged into `out`.
    """

    down: Tensor
    query_norm: Tensor | None
    latent_norm: Tensor
    query: Tensor
    w_uk: Tensor | None
    out: Tensor
    w_uv: Tensor | None

    @classmethod
    def of(cls, attention: LatentAttention, config: ModelConfig) -> LatentProjections:
        """The weights of a module."""
        heads, nope, rope = attention.heads, attention.nope, attention.rope
        latent, v_size = attention.rank, attention.v_size
        order = _pairs(rope, config.rope_interleave)
        kv_a = attention.kv_a_proj_with_mqa.weight
        kv_a = torch.cat((kv_a[:latent], kv_a[latent:][order]))
        if attention.q_rank is None:
            down, query_norm, up = kv_a, None, attention.q_proj.weight
        else:
            down = torch.cat((attention.q_a_proj.weight, kv_a))
            query_norm, up = attention.q_a_layernorm.weight, attention.q_b_proj.weight
        up = up.view(heads, nope + rope, -1) * attention.scale
        plain, turned = up[:, :nope], up[:, nope:][:, order]
        up_kv = attention.kv_b_proj.weight.view(heads, nope + v_size, latent)
        w_uk, w_uv = torch.split(up_kv, [nope, v_size], dim=1)
        out = attention.o_proj.weight.view(-1, heads, v_size)
        merged_query: Tensor | None = w_uk
        if latent * plain.shape[2] <= _WORTH * nope * (plain.shape[2] + latent):
            # In float64, so that the product is rounded once, like the factors.
            plain = (w_uk.double().transpose(1, 2) @ plain.double()).to(plain.dtype)
            merged_query = None
        merged_out: Tensor | None = w_uv.transpose(1, 2)
        if latent * out.shape[0] <= _WORTH * v_size * (out.shape[0] + latent):
            out = torch.einsum("dhv,hvc->dhc", out.double(), w_uv.double()).to(out.dtype)
            merged_out = None
        return cls(
            down=down.detach(),
            query_norm=None if query_norm is None else query_norm.detach(),
            latent_norm=attention.kv_a_layernorm.weight.detach(),
            query=torch.cat((plain, turned), dim=1).flatten(0, 1).detach(),
            w_uk=None if merged_query is None else merged_query.detach().contiguous(),
            out=out.flatten(1).detach().contiguous(),
            w_uv=None if merged_out is None else merged_out.detach().contiguous(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedWeights:
    """Gate and shared experts of a mixture-of-experts layer.

    Attributes:
        weight: [E, D], the gate's centroids.
        bias: [E], the bias for the choice of experts.
        shared: The shared experts; zero where there are none.
    """

    weight: Tensor
    bias: Tensor
    shared: SwiGLUWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer block.

    Attributes:
        index: Model layer index.
        attention_norm: [D], the norm before attention.
        attention: Projections of the attention.
        mlp_norm: [D], the norm before the feed-forward part.
        mlp: The network of a dense layer; None in a mixture-of-experts layer.
        routed: Gate and shared experts; None in a dense layer.
    """

    index: int
    attention_norm: Tensor
    attention: LatentProjections
    mlp_norm: Tensor
    mlp: SwiGLUWeights | None
    routed: RoutedWeights | None

    @classmethod
    def of(cls, block: Block, index: int, config: ModelConfig) -> LayerWeights:
        """The weights of a module."""
        mlp, norm = block.mlp, block.post_attention_layernorm.weight
        routed = None
        if isinstance(mlp, MoE):
            shared = mlp.shared_experts
            routed = RoutedWeights(
                weight=mlp.gate.weight.detach(),
                bias=mlp.gate.e_score_correction_bias.detach().clone(),
                shared=SwiGLUWeights.zero(norm) if shared is None else SwiGLUWeights.of(shared),
            )
        return cls(
            index=index,
            attention_norm=block.input_layernorm.weight.detach(),
            attention=LatentProjections.of(block.self_attn, config),
            mlp_norm=norm.detach(),
            mlp=SwiGLUWeights.of(mlp) if isinstance(mlp, SwiGLU) else None,
            routed=routed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """One multi-token-prediction module; the join and the norms before it are None in `parallel` mode."""

    layer: LayerWeights
    norm: Tensor
    embedding_norm: Tensor | None
    hidden_norm: Tensor | None
    join: Tensor | None

    @classmethod
    def of(cls, module: MTPModule, index: int, config: ModelConfig) -> ModuleWeights:
        """The weights of a module."""
        chain = config.mtp_mode == "chain"
        return cls(
            layer=LayerWeights.of(module, index, config),
            norm=module.shared_head.norm.weight.detach(),
            embedding_norm=module.enorm.weight.detach() if chain else None,
            hidden_norm=module.hnorm.weight.detach() if chain else None,
            join=module.eh_proj.weight.detach() if chain else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkWeights:
    """The whole trunk: embedding [V, D], layers, final norm [D], head [V, D], MTP modules."""

    config: ModelConfig
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    modules: tuple[ModuleWeights, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Transformer, *, modules: bool = True) -> TrunkWeights:
        """The weights of a model, which is not needed afterwards.

        Args:
            model: The model.
            modules: Whether to take the MTP modules; without them no drafts are made.
        """
        config = model.config
        blocks = model.model.layers
        drafting: list[ModuleWeights] = []
        for index in config.mtp_layers if modules else ():
            block = blocks[index]
            assert isinstance(block, MTPModule)
            drafting.append(ModuleWeights.of(block, index, config))
        main: list[LayerWeights] = []
        for index in range(config.num_hidden_layers):
            block = blocks[index]
            assert isinstance(block, Block)
            main.append(LayerWeights.of(block, index, config))
        return cls(
            config=config,
            embedding=model.model.embed_tokens.weight.detach(),
            layers=tuple(main),
            norm=model.model.norm.weight.detach(),
            head=model.lm_head.weight.detach(),
            modules=tuple(drafting),
        )


def _pairs(size: int, interleave: bool) -> Tensor:
    """The order in which the two rotary dimensions of each pair are neighbours."""
    order = torch.arange(size)
    return order if interleave else order.view(2, size // 2).t().flatten()


__all__ = [
    "LatentProjections",
    "LayerWeights",
    "ModuleWeights",
    "RoutedWeights",
    "SwiGLUWeights",
    "TrunkWeights",
]
