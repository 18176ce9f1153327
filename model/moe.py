"""The mixture-of-experts layer (eq. 12 of arXiv 2412.19437), which is given its routed experts from outside.

Shapes: B rows, T positions, N = B·T tokens, D hidden, E routed experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.balance import expert_load
from model.balance_loss import BalanceWeights, layer_balance_loss
from model.config import ModelConfig
from model.experts.protocols import Experts
from model.mlp import SwiGLU
from model.routing import affinity, gate_values, select_experts
from model.routing_trace import Trace


class Gate(nn.Module):
    """Expert centroids `weight` [E, D] and the float32 buffer `e_score_correction_bias` [E].

    Both stay float32 in a model of half precision: affinities are computed in float32, and the choice of
    experts should not depend on the rounding of weights.
    """

    e_score_correction_bias: Tensor

    def __init__(self, n_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, hidden_size, dtype=_at_least_float32()))
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts, dtype=torch.float32))

    def forward(self, rows: Tensor) -> Tensor:
        """Affinities [N, E] of rows [N, D], in float32 at least."""
        return affinity(rows, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move weight and bias with the module, but convert neither of them to half precision."""
        bias, weight = self.e_score_correction_bias, self.weight.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.e_score_correction_bias
        if moved.dtype != bias.dtype:
            self.e_score_correction_bias = _moved(bias, moved)
        if self.weight.dtype.itemsize < 4:
            self.weight.data = _moved(weight.float(), self.weight.detach())
        return self


def _at_least_float32() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _moved(kept: Tensor, converted: Tensor) -> Tensor:
    """The tensor from before a conversion, on the device of the converted one."""
    return torch.empty_like(converted, dtype=kept.dtype) if kept.is_meta else kept.to(converted.device)


class MoE(nn.Module):
    """Gate and shared experts (None where there are none); the routed ones are reached through `Experts`."""

    shared_experts: SwiGLU | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = Gate(config.n_routed_experts, config.hidden_size)
        wide = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = SwiGLU(config.hidden_size, wide) if wide else None

    def forward(
        self,
        x: Tensor,
        *,
        experts: Experts,
        trace: Trace,
        mask: Tensor | None,
        balance: BalanceWeights | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Route, and add the routed and the shared experts' outputs.

        Args:
            x: [B, T, D].
            trace: Provides the route if it has this layer's, else records route and load.
            mask: [B, T], true where a token counts for load and balance; None counts all.
            balance: Weights of the balance losses; None computes no balance loss.

        Returns:
            Outputs [B, T, D], and the weighted balance loss, a mean over the rows (None without one).
        """
        config = self.config
        rows = x.flatten(0, 1)
        scores: Tensor = self.gate(rows)
        idx = trace.routes.get(self.layer)
        if idx is None:
            idx = select_experts(
                scores.detach(),
                self.gate.e_score_correction_bias,
                top_k=config.num_experts_per_tok,
                n_group=config.n_group,
                topk_group=config.topk_group,
                group_score=config.group_score,
                group_experts=config.scored_experts,
            )
            trace.routes[self.layer] = idx
            counted = None if mask is None else mask.flatten()
            trace.loads[self.layer] = expert_load(idx, config.n_routed_experts, counted)
            trace.masks[self.layer] = counted
        gates = gate_values(scores, idx, normalize=config.norm_topk_prob, factor=config.routed_scaling_factor)
        # Dispatch, shared, combine: the shared experts compute while the tokens are away. The backward pass
        # runs in the reverse order of creation, so that the same overlap takes place there.
        pending = experts.dispatch(self.layer, rows, idx, gates)
        shared = None if self.shared_experts is None else self.shared_experts(rows)
        out = pending.combine()
        out = (out if shared is None else shared + out).view_as(x)
        loss = None
        if balance is not None:
            loss = layer_balance_loss(
                scores.view(*x.shape[:2], -1),
                idx,
                mask,
                weights=balance,
                config=config,
                batch=trace.batch.get(self.layer),
            )
        return out, loss


__all__ = ["Gate", "MoE"]
