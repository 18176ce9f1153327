"""Grouped SwiGLU over one host's experts of one layer, with a backward pass written by hand.

Shapes: n rows, nnz (row, expert) pairs, D hidden, I moe_intermediate_size, E experts in the shard.
For a pair of row x and expert e with gate g:

    a, u = W13_e x          h = silu(a) * u          partial[row] += g * (W2_e h)

Pairs are sorted by expert, so that each expert is one matrix product (`model.grouped`). Sums over the pairs
of a row run in the order of the request (`embedding_bag`), so that results repeat to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import mix_experts
from model.grouped import Groups, group
from model.transfer import to_device

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}  # what compiled functions take
_FEW_ROWS = 16  # up to here, reading weights in one sweep beats sorting pairs for products of many rows


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


Array = npt.NDArray[Any]


class ArrayPending(Protocol):
    """The routed experts' answer to a dispatch of arrays."""

    def add_to(self, out: Array) -> None:
        """Wait for it and add the gate-weighted sums to `out` [N, D]."""
        ...


@runtime_checkable
class ArrayExperts(Protocol):
    """Experts that take few rows as arrays too, for callers that have no tensors."""

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> ArrayPending | None:
        """`Experts.dispatch` for inference, or None where it has to be that."""
        ...


@runtime_checkable
class PairedExperts(Protocol):
    """Experts that are away for a while, and take two dispatches of a layer at a time."""

    @property
    def pair(self) -> tuple[Experts, Experts]:
        """The ways of the two."""
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
    """What a backward pass needs of its forward pass; owns all its memory, and may be used again.

    Attributes:
        rows: [n, D] copy of the inputs.
        hidden: [nnz, 2I], W13 x of the pairs, sorted by expert.
        gate: [nnz] sorted by expert.
        pairs: how the pairs were sorted.
    """

    rows: Tensor
    hidden: Tensor
    gate: Tensor
    pairs: _Pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The pairs of a request in the order of their experts.

    Attributes:
        token: [nnz] int64, the row of each sorted pair.
        order: [nnz] int64, the request's index of each sorted pair.
        place: [nnz] int64, the inverse of `order`.
        row_ptr: [n + 1] int64, a copy.
        groups: the pairs of each expert.
    """

    token: Tensor
    order: Tensor
    place: Tensor
    row_ptr: Tensor
    groups: Groups


@torch.no_grad()
def experts_forward(
    shard: ExpertShard, rows: Tensor, row_ptr: Tensor, local_expert: Tensor, gate: Tensor, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """Gate-weighted sum over this shard's experts of every row; threads may call it at the same time.

    Args:
        rows: [n, D].
        row_ptr: [n + 1] int32, the pairs of row i are row_ptr[i] … row_ptr[i + 1].
        local_expert: [nnz] int32, indices into the shard; like row_ptr on the rows' device or the CPU.
        gate: [nnz].
        keep: whether a backward pass will follow.

    Returns:
        partial [n, D], and what `experts_backward` takes (None without `keep`).
    """
    gate = gate.to(rows.dtype)
    if rows.shape[0] <= _FEW_ROWS and not keep and _compiles(rows):
        pointers = row_ptr.numpy().astype(np.int64, copy=False)
        return _few_rows(shard.w13, shard.w2, rows, pointers, local_expert, gate), None
    pairs = _sort_pairs(row_ptr, local_expert, shard, rows)
    width = shard.w2.shape[2]
    x = rows.index_select(0, pairs.token)
    hidden = pairs.groups.multiply(x, shard.w13.transpose(1, 2), memory=rows.new_empty(x.shape[0], 2 * width))
    act = F.silu(hidden[:, :width]).mul_(hidden[:, width:])
    # The gathered inputs are done with: the outputs take their place, still in the cache.
    x = pairs.groups.multiply(act, shard.w2.transpose(1, 2), memory=x)
    partial = _sum_rows(x, pairs, gate)
    if not keep:
        return partial, None
    # A copy of the rows is a K-th of the gathered ones; gathering again is cheaper than keeping them.
    gate = gate.index_select(0, pairs.order)
    return partial, Saved(rows=rows.clone(), hidden=hidden, gate=gate, pairs=pairs)


@torch.no_grad()
def experts_backward(shard: ExpertShard, saved: Saved, d_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs and gates; those of the weights are added into the shard's buffers.

    Threads may call it at the same time.

    Args:
        saved: from `experts_forward(…, keep=True)`.
        d_partial: [n, D].

    Returns:
        d_rows [n, D] and d_gate [nnz], in the order of the request's pairs.
    """
    d_w13, d_w2 = shard.allocate_gradients()
    pairs, width = saved.pairs, shard.w2.shape[2]
    a, up = saved.hidden[:, :width], saved.hidden[:, width:]
    gate = saved.gate.unsqueeze(1)
    d_y = d_partial.index_select(0, pairs.token)
    groups = pairs.groups
    d_act = groups.multiply(d_y, shard.w2, memory=d_y.new_empty(d_y.shape[0], width))
    silu = F.silu(a)
    act = silu * up
    # <d_partial, W2 h> = <W2' d_partial, h>: the gate's gradient needs no expert's output.
    d_gate = torch.mul(act, d_act).sum(1).index_select(0, pairs.place)
    d_act.mul_(gate)
    d_hidden = torch.empty_like(saved.hidden)
    torch.mul(d_act, silu, out=d_hidden[:, width:])
    torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), a, grad_input=d_hidden[:, :width])
    groups.add_outer(d_w2, d_y, act.mul_(gate), shard.lock)
    # d_y is done with: the inputs' gradients take its place.
    d_y = groups.multiply(d_hidden, shard.w13, memory=d_y)
    d_rows = _sum_rows(d_y, pairs, None)
    x = torch.index_select(saved.rows, 0, pairs.token, out=d_y)
    groups.add_outer(d_w13, d_hidden, x, shard.lock)
    return d_rows, d_gate


def _few_rows(
    w13: Tensor, w2: Tensor, rows: Tensor, row_ptr: npt.NDArray[np.int64], expert: Tensor, gate: Tensor
) -> Tensor:
    """The forward pass of a few rows: one sweep over the weights of the experts that they need."""
    partial = np.zeros(rows.shape, _NUMPY[rows.dtype])
    mix_experts(
        rows.detach().contiguous().numpy(),
        row_ptr,
        expert.numpy().astype(np.int64, copy=False),
        gate.detach().contiguous().numpy(),
        w13.detach().numpy(),
        w2.detach().numpy(),
        partial,
    )
    return torch.from_numpy(partial)


@cache
def _even(rows: int, top_k: int) -> npt.NDArray[np.int64]:
    """The row_ptr of rows with so many experts each; nobody writes to it."""
    return np.arange(0, rows * top_k + 1, top_k)


def _compiles(rows: Tensor) -> bool:
    return rows.dtype in _NUMPY and rows.device.type == "cpu"


def _sort_pairs(row_ptr: Tensor, local_expert: Tensor, shard: ExpertShard, rows: Tensor) -> _Pairs:
    """Sort where the pairs are; where rows are on a GPU the CPU waits for nothing."""
    n_experts, widths = shard.n_experts, (shard.w13.shape[1], *shard.w2.shape[1:])
    order = local_expert.sort(stable=True).indices
    row_ptr = row_ptr.to(torch.int64, copy=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    token = torch.repeat_interleave(row_ptr.diff(), output_size=order.numel()).index_select(0, order)
    return _Pairs(
        token=to_device(token, rows.device),
        order=to_device(order, rows.device),
        place=to_device(place, rows.device),
        row_ptr=to_device(row_ptr, rows.device),
        groups=group(local_expert.index_select(0, order), n_experts, like=rows, widths=widths),
    )


def _sum_rows(values: Tensor, pairs: _Pairs, gate: Tensor | None) -> Tensor:
    """[n, D]: for each row the (gate-weighted) sum of its pairs' values [nnz, D], in the request's order."""
    if values.shape[0] == 0:
        return values.new_zeros(pairs.row_ptr.numel() - 1, values.shape[1])
    return F.embedding_bag(
        pairs.place, values, pairs.row_ptr, mode="sum", per_sample_weights=gate, include_last_offset=True
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


class _Mixed(NamedTuple):
    """An `ArrayPending` that computes when it is waited for."""

    w13: Array
    w2: Array
    rows: Array
    idx: Array
    gates: Array

    def add_to(self, out: Array) -> None:
        pointers = _even(*self.idx.shape)
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
        """See `Experts.dispatch`."""
        w13, w2 = self.weights(layer)
        if not torch.is_grad_enabled():
            row_ptr = torch.arange(0, idx.numel() + 1, idx.shape[1], device=idx.device)
            partial, _ = experts_forward(
                ExpertShard(w13, w2), rows, row_ptr, idx.reshape(-1), gates.reshape(-1), keep=False
            )
            return Done(partial)
        return Done(_GroupedExperts.apply(rows, gates, idx, w13, w2))  # type: ignore[no-untyped-call]

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> ArrayPending | None:
        """See `ArrayExperts.dispatch_arrays`."""
        weights = self.layers[str(layer)]._parameters  # the public way takes longer than the products
        w13, w2 = weights["w13"], weights["w2"]
        assert w13 is not None and w2 is not None
        if rows.shape[0] > _FEW_ROWS or not _compiles(w13):
            return None
        return _Mixed(w13.detach().numpy(), w2.detach().numpy(), rows, idx, gates)


__all__ = [
    "ArrayExperts",
    "ArrayPending",
    "Done",
    "ExpertShard",
    "Experts",
    "LocalExperts",
    "PairedExperts",
    "Pending",
    "Saved",
    "experts_backward",
    "experts_forward",
]
