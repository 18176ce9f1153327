"""One transformer block, and the inputs that all blocks of a forward pass share.

Shapes: B rows, T positions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import LatentAttention
from model.balance_loss import BalanceWeights
from model.config import ModelConfig
from model.experts.protocols import Experts
from model.mlp import SwiGLU
from model.moe import MoE
from model.norm import RMSNorm
from model.rope import Rotation
from model.routing_trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Inputs that all blocks of one forward pass share.

    Attributes:
        experts: The routed experts.
        trace: Routes and loads of this pass.
        rotation: Angles of the positions.
        mask: [B, 1, T, T], added to the logits of attention; None when attention is plainly causal.
        counted: [B, T], false on padding; None when there is no padding.
        balance: Weights of the balance losses; None for no balance loss.
        recompute: Keep each block's input alone for the backward pass, and run the block again there.
    """

    experts: Experts
    trace: Trace
    rotation: Rotation
    mask: Tensor | None = None
    counted: Tensor | None = None
    balance: BalanceWeights | None = None
    recompute: bool = False


class Block(nn.Module):
    """One transformer block: attention, then a dense or a mixture-of-experts network."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: SwiGLU | MoE
        if layer < config.first_k_dense_replace:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, layer)

    def forward(self, x: Tensor, through: Pass) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]; also return the block's balance loss."""
        if through.recompute and torch.is_grad_enabled():
            # Reentrant: the first pass runs without gradients, so experts keep nothing for it.
            again: Any = checkpoint(self._run, x, through, use_reentrant=True, preserve_rng_state=False)
            out, loss = again
            return out, loss
        return self._run(x, through)

    def _run(self, x: Tensor, through: Pass) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), through.rotation, through.mask)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SwiGLU):
            return x + self.mlp(normed), None
        out, loss = self.mlp(
            normed,
            experts=through.experts,
            trace=through.trace,
            mask=through.counted,
            balance=through.balance,
        )
        return x + out, loss


__all__ = ["Block", "Pass"]
