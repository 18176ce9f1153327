"""Grouped SwiGLU over one host's experts of one layer, with a backward pass written by hand.

Shapes: n rows, nnz (row, expert) pairs, D hidden, I moe_intermediate_size, E experts in the shard.
For a pair of row x and expert e with gate g:

    a, u = W13_e x          h = silu(a) * u          partial[row] += g * (W2_e h)

Pairs are worked on expert by expert, so that each weight is read once and what a pair needs stays in the
cache. Sums over the pairs of a row run in a fixed order (`embedding_bag`), so results repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pending(Protocol):
    """The routed experts' answer to one dispatch, possibly still on its way."""

    def combine(self) -> Tensor:
        """Wait for it and return the gate-weighted sums [N, D]; differentiable."""
        ...


class Experts(Protocol):
    """The routed experts of all MoE layers, given to the transformer from outside."""

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """Send rows [N, D] to the experts idx [N, K] of a layer, with gates [N, K]."""
        ...


@dataclass(slots=True)
class ExpertShard:
    """The stacked weights of some experts of one layer, and their gradients when training.

    Attributes:
        w13: [E, 2I, D], gate_proj above up_proj.
        w2: [E, D, I].
        d_w13, d_w2: gradients of the same shapes; None until `allocate_gradients` (or the first backward).
    """

    w13: Tensor
    w2: Tensor
    d_w13: Tensor | None = None
    d_w2: Tensor | None = None
    lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def n_experts(self) -> int:
        return self.w13.shape[0]

    def allocate_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradient buffers, zeros when new, so that an expert without tokens has a zero gradient."""
        with self.lock:
            if self.d_w13 is None:
                self.d_w13 = torch.zeros_like(self.w13)
            if self.d_w2 is None:
                self.d_w2 = torch.zeros_like(self.w2)
            return self.d_w13, self.d_w2


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a backward pass needs of its forward pass; owns all its memory.

    Attributes:
        rows: [n, D] copy of the inputs.
        hidden: [nnz, 2I], W13 x of the pairs, sorted by expert.
        gate: [nnz] sorted by expert.
        token: [nnz] the row of each sorted pair.
        place: [nnz] where each pair of the request lies in the sorted order.
        row_ptr: [n + 1].
        counts: pairs per expert.
    """

    rows: Tensor
    hidden: Tensor
    gate: Tensor
    token: Tensor
    place: Tensor
    row_ptr: Tensor
    counts: tuple[int, ...]


@torch.no_grad()
def experts_forward(
    shard: ExpertShard, rows: Tensor, row_ptr: Tensor, local_expert: Tensor, gate: Tensor, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """Gate-weighted sum over this shard's experts of every row.

    Args:
        rows: [n, D].
        row_ptr: [n + 1] int32, pairs of row i are row_ptr[i] … row_ptr[i + 1].
        local_expert: [nnz] int32, indices into the shard.
        gate: [nnz].
        keep: whether a backward pass will follow.

    Returns:
        partial [n, D], and what `experts_backward` takes (None without `keep`).
    """
    token, place, order, counts = _sort_pairs(row_ptr, local_expert, shard.n_experts)
    width = shard.w2.shape[2]
    hidden = rows.new_empty(token.numel(), 2 * width)
    out = rows.new_empty(token.numel(), rows.shape[1])
    largest = max(counts)
    x = rows.new_empty(largest, rows.shape[1])
    act = rows.new_empty(largest, width)
    for e, span in _spans(counts):
        m = span.stop - span.start
        torch.index_select(rows, 0, token[span], out=x[:m])
        h = torch.mm(x[:m], shard.w13[e].t(), out=hidden[span])
        a = F.silu(h[:, :width]).mul_(h[:, width:])
        torch.mm(a, shard.w2[e].t(), out=out[span])
    del act
    gate = gate.to(rows.dtype)
    partial = _sum_rows(out, place, row_ptr, gate)
    if not keep:
        return partial, None
    saved = Saved(
        rows=rows.clone(),
        hidden=hidden,
        gate=gate[order],
        token=token,
        place=place,
        row_ptr=row_ptr.clone(),
        counts=counts,
    )
    return partial, saved


@torch.no_grad()
def experts_backward(shard: ExpertShard, saved: Saved, d_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs and gates; the weights' gradients are added into the shard's buffers.

    Args:
        saved: from `experts_forward(…, keep=True)`.
        d_partial: [n, D].

    Returns:
        d_rows [n, D] and d_gate [nnz], in the order of the request's pairs.
    """
    d_w13, d_w2 = shard.allocate_gradients()
    width = shard.w2.shape[2]
    d_gate = torch.empty_like(saved.gate)
    d_x = saved.rows.new_empty(saved.token.numel(), saved.rows.shape[1])
    for e, span in _spans(saved.counts):
        token = saved.token[span]
        gate = saved.gate[span].unsqueeze(1)
        x = saved.rows.index_select(0, token)
        d_y = d_partial.index_select(0, token)
        a, up = saved.hidden[span, :width], saved.hidden[span, width:]
        d_act = d_y @ shard.w2[e]
        silu = F.silu(a)
        act = silu * up
        # <d_partial, W2 h> = <W2' d_partial, h>: the gate's gradient without the experts' outputs.
        torch.sum(act * d_act, dim=1, out=d_gate[span])
        d_act.mul_(gate)
        d_hidden = torch.empty_like(saved.hidden[span])
        torch.mul(d_act, silu, out=d_hidden[:, width:])
        d_hidden[:, :width] = torch.ops.aten.silu_backward(d_act.mul_(up), a)
        act.mul_(gate)
        with shard.lock:
            d_w2[e].addmm_(d_y.t(), act)
            d_w13[e].addmm_(d_hidden.t(), x)
        torch.mm(d_hidden, shard.w13[e], out=d_x[span])
    return _sum_rows(d_x, saved.place, saved.row_ptr, None), d_gate[saved.place]


def _sort_pairs(
    row_ptr: Tensor, local_expert: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """token, place, order (all [nnz] int64) and the pairs per expert, for pairs sorted by expert."""
    _, order = local_expert.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    counts = tuple(torch.bincount(local_expert, minlength=n_experts).tolist())
    n = row_ptr.numel() - 1
    token = torch.repeat_interleave(torch.arange(n, device=order.device), row_ptr.diff().long())[order]
    return token, place, order, counts


def _spans(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its slice of the sorted pairs) for every expert that has any."""
    spans, start = [], 0
    for e, m in enumerate(counts):
        if m:
            spans.append((e, slice(start, start + m)))
        start += m
    return spans


def _sum_rows(values: Tensor, place: Tensor, row_ptr: Tensor, gate: Tensor | None) -> Tensor:
    """[n, D]: for each row the (gate-weighted) sum of its pairs' values [nnz, D], in the request's order."""
    return F.embedding_bag(
        place, values, row_ptr.long(), mode="sum", per_sample_weights=gate, include_last_offset=True
    )


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


@dataclass(frozen=True, slots=True)
class Done:
    """A `Pending` whose answer is there already."""

    partial: Tensor

    def combine(self) -> Tensor:
        return self.partial


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
        """See `Experts.dispatch`."""
        w13, w2 = self.weights(layer)
        return Done(_GroupedExperts.apply(rows, gates, idx, w13, w2))  # type: ignore[no-untyped-call]


__all__ = [
    "Done",
    "ExpertShard",
    "Experts",
    "LocalExperts",
    "Pending",
    "Saved",
    "experts_backward",
    "experts_forward",
]
