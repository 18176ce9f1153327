"""SwiGLU feed-forward network (arXiv 2002.05202) of dense layers and shared experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _SwiGLUFunction(torch.autograd.Function):
    """W_down (silu(W_gate x) * W_up x); keeps W_gate x and W_up x alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gate, up = rows @ w_gate.t(), rows @ w_up.t()
        ctx.save_for_backward(x, w_gate, w_up, w_down, gate, up)
        return (F.silu(gate).mul_(up) @ w_down.t()).view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
        rows, d_y = x.flatten(0, -2), d_y.flatten(0, -2)
        silu = F.silu(gate)
        d_act = d_y @ w_down
        d_down = d_y.t() @ (silu * up)
        d_up = silu.mul_(d_act)
        d_gate = torch.ops.aten.silu_backward(d_act.mul_(up), gate)
        d_x = torch.addmm(d_gate @ w_gate, d_up, w_up)
        return d_x.view_as(x), d_gate.t() @ rows, d_up.t() @ rows, d_down


class SwiGLU(nn.Module):
    """Feed-forward network with gate_proj, up_proj [I, D] and down_proj [D, I]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        out: Tensor = _SwiGLUFunction.apply(  # type: ignore[no-untyped-call]
            x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        )
        return out


__all__ = ["SwiGLU"]
