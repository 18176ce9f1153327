"""The mathematics of routed experts: grouped SwiGLU with a hand-written backward pass.

Shapes: n rows, nnz (row, expert) pairs, D hidden, I moe_intermediate_size, E experts in the shard.
For a pair of row x and expert e with gate g:

    a, u = W13_e x          h = silu(a) * u          partial[row] += g * (W2_e h)

Pairs are sorted by expert, so that each expert is one matrix product (`model.experts.grouped_products`). Sums
over the pairs of a row run in the order of the request (`embedding_bag`), so that results repeat to the bit.
A few rows in inference take the compiled `kernels.experts.mix_experts`, the same function to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.constants import FEW_ROWS
from kernels.experts import mix_experts
from model.device_copies import to_device
from model.experts.grouped_products import Groups, group

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}  # what compiled functions take


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
        """The gradient buffers, created as zeros, so that an expert without tokens has a zero gradient."""
        with self.lock:
            if self.d_w13 is None:
                self.d_w13 = torch.zeros_like(self.w13)
            if self.d_w2 is None:
                self.d_w2 = torch.zeros_like(self.w2)
            return self.d_w13, self.d_w2


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedForward:
    """What a backward pass needs of its forward pass; it owns all its memory, and may be used repeatedly.

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
) -> tuple[Tensor, SavedForward | None]:
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
    if rows.shape[0] <= FEW_ROWS and not keep and is_compiled_for(rows):
        pointers = row_ptr.numpy().astype(np.int64, copy=False)
        return _few_rows(shard.w13, shard.w2, rows, pointers, local_expert, gate), None
    pairs = _sort_pairs(row_ptr, local_expert, shard, rows)
    width = shard.w2.shape[2]
    x = rows.index_select(0, pairs.token)
    hidden = pairs.groups.multiply(x, shard.w13.transpose(1, 2), memory=rows.new_empty(x.shape[0], 2 * width))
    act = F.silu(hidden[:, :width]).mul_(hidden[:, width:])
    # The gathered inputs are no longer needed: the outputs take their memory, which is still in the cache.
    x = pairs.groups.multiply(act, shard.w2.transpose(1, 2), memory=x)
    partial = _sum_rows(x, pairs, gate)
    if not keep:
        return partial, None
    # A copy of the rows is a K-th of the gathered ones; gathering again is cheaper than keeping them.
    gate = gate.index_select(0, pairs.order)
    return partial, SavedForward(rows=rows.clone(), hidden=hidden, gate=gate, pairs=pairs)


@torch.no_grad()
def experts_backward(shard: ExpertShard, saved: SavedForward, d_partial: Tensor) -> tuple[Tensor, Tensor]:
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
    # d_y is no longer needed: the inputs' gradients take its memory.
    d_y = groups.multiply(d_hidden, shard.w13, memory=d_y)
    d_rows = _sum_rows(d_y, pairs, None)
    x = torch.index_select(saved.rows, 0, pairs.token, out=d_y)
    groups.add_outer(d_w13, d_hidden, x, shard.lock)
    return d_rows, d_gate


def _few_rows(
    w13: Tensor, w2: Tensor, rows: Tensor, row_ptr: npt.NDArray[np.int64], expert: Tensor, gate: Tensor
) -> Tensor:
    """Gate-weighted sums [n, D] of a few rows: one sweep over the weights of the chosen experts."""
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


def is_compiled_for(rows: Tensor) -> bool:
    """Whether the kernels take tensors of this type and device."""
    return rows.dtype in _NUMPY and rows.device.type == "cpu"


def _sort_pairs(row_ptr: Tensor, local_expert: Tensor, shard: ExpertShard, rows: Tensor) -> _Pairs:
    """Sort the pairs by expert, on the device where they lie, so that the CPU does not wait for a GPU."""
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


__all__ = ["ExpertShard", "SavedForward", "experts_backward", "experts_forward", "is_compiled_for"]
