"""All routed experts in this process, as a module with parameters: for one-process training, tests and tools.

Shapes: N tokens, D hidden, I moe_intermediate_size, E experts per layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.constants import FEW_ROWS
from kernels.experts import mix_experts
from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward, is_compiled_for
from model.experts.protocols import Array, ArrayPending, CompletedPending, Pending


class _LocalArrayPending(NamedTuple):
    """An `ArrayPending` that computes when it is waited for."""

    w13: Array
    w2: Array
    rows: Array
    idx: Array
    gates: Array

    def add_to(self, out: Array) -> None:
        pointers = _even_row_ptr(*self.idx.shape)
        mix_experts(self.rows, pointers, self.idx.ravel(), self.gates.ravel(), self.w13, self.w2, out)


class LocalExperts(nn.Module):
    """All routed experts in this process, as parameters `layers.{layer}.w13` [E, 2I, D] and `.w2` [E, D, I].

    Args:
        layers: the model layers that have routed experts (`ModelConfig.moe_layers`).
        n_experts: E.
        hidden_size: D.
        intermediate_size: I (moe_intermediate_size).
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        n_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer in layers:
            weights = nn.Module()
            for name, shape in (
                ("w13", (n_experts, 2 * intermediate_size, hidden_size)),
                ("w2", (n_experts, hidden_size, intermediate_size)),
            ):
                weights.register_parameter(
                    name, nn.Parameter(torch.empty(shape, dtype=dtype).normal_(0, std))
                )
            self.layers[str(layer)] = weights

    def weights(self, layer: int) -> tuple[nn.Parameter, nn.Parameter]:
        """w13 and w2 of a layer."""
        weights = self.layers[str(layer)]
        return weights.get_parameter("w13"), weights.get_parameter("w2")

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        w13, w2 = self.weights(layer)
        if not torch.is_grad_enabled():
            row_ptr = torch.arange(0, idx.numel() + 1, idx.shape[1], device=idx.device)
            partial, _ = experts_forward(
                ExpertShard(w13, w2), rows, row_ptr, idx.reshape(-1), gates.reshape(-1), keep=False
            )
            return CompletedPending(partial)
        return CompletedPending(_GroupedExperts.apply(rows, gates, idx, w13, w2))  # type: ignore[no-untyped-call]

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> ArrayPending | None:
        weights = self.layers[str(layer)]._parameters  # the public way takes longer than the products
        w13, w2 = weights["w13"], weights["w2"]
        assert w13 is not None and w2 is not None
        if rows.shape[0] > FEW_ROWS or not is_compiled_for(w13):
            return None
        return _LocalArrayPending(w13.detach().numpy(), w2.detach().numpy(), rows, idx, gates)


class _GroupedExperts(torch.autograd.Function):
    """`experts_forward` and `experts_backward` as one differentiable function of rows, gates and weights."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gates: Tensor,
        idx: Tensor,
        w13: Tensor,
        w2: Tensor,
    ) -> Tensor:
        row_ptr = torch.arange(0, idx.numel() + 1, idx.shape[1], device=idx.device, dtype=torch.int32)
        keep = any(ctx.needs_input_grad)
        partial, saved = experts_forward(
            ExpertShard(w13, w2), rows, row_ptr, idx.reshape(-1), gates.reshape(-1), keep=keep
        )
        ctx.saved = saved
        ctx.gate_type = gates.dtype
        ctx.save_for_backward(w13, w2)
        return partial

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_partial: Tensor) -> tuple[Tensor | None, ...]:
        shard = ExpertShard(*ctx.saved_tensors)
        d_rows, d_gate = experts_backward(shard, ctx.saved, d_partial)
        return d_rows, d_gate.view(d_rows.shape[0], -1).to(ctx.gate_type), None, shard.d_w13, shard.d_w2


@cache
def _even_row_ptr(rows: int, top_k: int) -> Array:
    """The row_ptr of `rows` rows with `top_k` experts each; shared, and never written to."""
    return np.arange(0, rows * top_k + 1, top_k)


__all__ = ["LocalExperts"]
