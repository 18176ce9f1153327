"""Multi-head latent attention (MLA), section 2.1.1 of arXiv 2412.19437.

`attention_by_equations` is the paper, one equation a line. `LatentAttention.forward` computes the same
faster, and is tested against it. `kernels.attention` computes it for decoding, from a cache of latents.

Shapes: B rows, T positions, H heads, D hidden, C kv_lora_rank; a head's query and key have `nope` dimensions
without position and `rope` rotary ones, its value has `v`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.constants import LATENT_NORM_EPS
from model.config import ModelConfig
from model.norm import RMSNorm
from model.rope import Rotation, attention_scale


class _HeadsFunction(torch.autograd.Function):
    """Queries, keys and values of all heads from their compressed forms (eq. 2-5, 7-9).

    One function instead of a dozen operations: what autograd would split, pad, copy and add is written once,
    in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        w_query: Tensor,
        latent: Tensor,
        w_latent: Tensor,
        k_rope: Tensor,
        rotation: Rotation,
        sizes: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, nope, v_size = sizes
        batch, length, rope = k_rope.shape
        q = F.linear(query, w_query).view(batch, length, heads, nope + rope)
        rotation.apply_(q[..., nope:])
        up = F.linear(latent, w_latent).view(batch, length, heads, nope + v_size)
        k = torch.empty_like(q)
        k[..., :nope] = up[..., :nope]
        turned = k_rope.unsqueeze(2).clone()
        rotation.apply_(turned)
        k[..., nope:] = turned
        # torch's attention kernels take values of the keys' size alone.
        v = F.pad(up[..., nope:], (0, max(0, nope + rope - v_size)))
        ctx.save_for_backward(query, w_query, latent, w_latent)
        ctx.rotation, ctx.sizes = rotation, sizes
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        query, w_query, latent, w_latent = ctx.saved_tensors
        _, nope, v_size = ctx.sizes
        d_q = d_q.contiguous()
        ctx.rotation.undo_(d_q[..., nope:])
        d_rope = d_k[..., nope:].sum(2, keepdim=True)
        ctx.rotation.undo_(d_rope)
        d_up = torch.cat((d_k[..., :nope], d_v[..., :v_size]), dim=-1).flatten(0, 1).flatten(1)
        d_q = d_q.flatten(0, 1).flatten(1)
        return (
            (d_q @ w_query).view_as(query),
            d_q.t() @ query.flatten(0, 1),
            (d_up @ w_latent).view_as(latent),
            d_up.t() @ latent.flatten(0, 1),
            d_rope.squeeze(2),
            None,
            None,
        )


class LatentAttention(nn.Module):
    """MLA with decoupled RoPE; parameters carry the names of Hugging Face's `self_attn`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.nope, self.rope = heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_size, self.rank, self.q_rank = config.v_head_dim, config.kv_lora_rank, config.q_lora_rank
        self.scale = attention_scale(config)
        if self.q_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, self.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(self.q_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(self.q_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.nope + self.v_size), bias=False)
        self.o_proj = nn.Linear(heads * self.v_size, hidden, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """Attention within each row (eq. 1-11).

        Args:
            x: [B, T, D].
            mask: [B, 1, T, T], added to the logits; None is plain causal attention, the fast path.

        Returns:
            [B, T, D].
        """
        if self.q_rank is None:
            query, w_query = x, self.q_proj.weight
            latent, k_rope = torch.split(self.kv_a_proj_with_mqa(x), [self.rank, self.rope], dim=-1)
        else:
            # One product for both compressions: x is read once.
            down = torch.cat((self.q_a_proj.weight, self.kv_a_proj_with_mqa.weight))
            sizes = [self.q_rank, self.rank, self.rope]
            query, latent, k_rope = torch.split(F.linear(x, down), sizes, dim=-1)
            query, w_query = self.q_a_layernorm(query), self.q_b_proj.weight
        q, k, v = _HeadsFunction.apply(  # type: ignore[no-untyped-call]
            query,
            w_query,
            self.kv_a_layernorm(latent),
            self.kv_b_proj.weight,
            k_rope,
            rotation,
            (self.heads, self.nope, self.v_size),
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )
        projected: Tensor = self.o_proj(out.transpose(1, 2)[..., : self.v_size].flatten(2))
        return projected


def attention_by_equations(
    attention: LatentAttention, x: Tensor, rotation: Rotation, mask: Tensor | None
) -> Tensor:
    """Equations 1 to 11 of arXiv 2412.19437: the reference form of `LatentAttention.forward`.

    Released weights have an RMSNorm after both compressions, which the paper's equations leave out.

    Args:
        x: [B, T, D], h in the equations.
        mask: [B, 1, T, T], added to the logits; None is plain causal attention.

    Returns:
        [B, T, D], u in the equations.
    """
    heads, nope, v_size, rank = attention.heads, attention.nope, attention.v_size, attention.rank
    w_dkv, w_kr = torch.split(
        attention.kv_a_proj_with_mqa.weight, [rank, attention.rope]
    )  # [C, D], [rope, D]
    up = attention.kv_b_proj.weight.view(heads, nope + v_size, rank)
    w_uk, w_uv = torch.split(up, [nope, v_size], dim=1)  # [H, nope, C], [H, v, C]
    if mask is None:
        mask = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)

    def rope(parts: Tensor) -> Tensor:
        turned = parts.clone()
        rotation.apply_(turned)
        return turned

    c_kv = attention.kv_a_layernorm(x @ w_dkv.t())  # (1)
    k_c = torch.einsum("btc,hdc->bthd", c_kv, w_uk)  # (2)
    k_r = rope((x @ w_kr.t()).unsqueeze(2))  # (3), one for all heads
    k = torch.cat((k_c, k_r.expand(-1, -1, heads, -1)), dim=-1)  # (4)
    v = torch.einsum("btc,hvc->bthv", c_kv, w_uv)  # (5)
    if attention.q_rank is None:
        q = attention.q_proj(x)  # (7) and (8) from h, in models without compressed queries
    else:
        c_q = attention.q_a_layernorm(attention.q_a_proj(x))  # (6)
        q = attention.q_b_proj(c_q)  # W^UQ and W^QR in one matrix
    q_c, q_r = torch.split(q.unflatten(-1, (heads, -1)), [nope, attention.rope], dim=-1)  # (7)
    q = torch.cat((q_c, rope(q_r)), dim=-1)  # (8), (9)
    logits = torch.einsum("bthd,bjhd->bhtj", q, k) * attention.scale + mask
    o = torch.einsum("bhtj,bjhv->bthv", logits.softmax(-1), v)  # (10)
    u: Tensor = attention.o_proj(o.flatten(2))  # (11)
    return u


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a position may look, -inf elsewhere: [B, 1, T, T] from document indices [B, T].

    A position sees earlier ones of its own document and itself; padding (-1) sees padding only.
    """
    length = segments.shape[1]
    seen = segments.unsqueeze(1) == segments.unsqueeze(2)
    seen &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)


__all__ = ["LatentAttention", "attention_by_equations", "document_mask"]
