"""Head and cross-entropy in one function, so that a batch's logits are never in memory at once.

Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is left out of the loss."""

# Logits of a chunk take 8 MiB in float32: they stay in a CPU's last cache between the product that makes
# them, the softmax, and the two products that take their gradient. A GPU has no such cache, but many cores.
_CHUNK_ELEMENTS = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 26


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of negative log-likelihoods; the forward pass also computes both gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        need_hidden, need_weight, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = _wide(hidden.dtype)
        # Many chunks are added to it: a sum in bfloat16 would lose the last ones.
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        kept = target != IGNORE
        goal = torch.where(kept, target, 0).unsqueeze(1)
        # Positions that are left out must not count in either product.
        on_cpu = hidden.device.type == "cpu"  # reading values of a GPU would wait for it
        rows = hidden if on_cpu and kept.all() else hidden * kept.unsqueeze(1)
        log_likelihood = hidden.new_empty(len(hidden), dtype=wide)
        chunks = _chunks(hidden, weight.shape[0])
        longest = chunks[0].stop if chunks else 0
        product = hidden.new_empty(longest, weight.shape[0])
        logs = product.new_empty(product.shape, dtype=log_likelihood.dtype)
        for chunk in chunks:
            n = chunk.stop - chunk.start
            logits = torch.mm(hidden[chunk], weight.t(), out=product[:n]).to(logs.dtype)
            torch.log_softmax(logits, 1, out=logs[:n])
            log_likelihood[chunk] = logs[:n].gather(1, goal[chunk]).squeeze(1)
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logs[:n].exp_()
            d_logits.scatter_add_(1, goal[chunk], d_logits.new_full((), -1).expand(n, 1))
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                if d_weight.dtype == hidden.dtype:
                    d_weight.addmm_(d_logits.t(), rows[chunk])
                else:
                    d_weight += d_logits.t() @ rows[chunk]
        if d_hidden is not None and rows is not hidden:
            d_hidden.mul_(kept.unsqueeze(1))
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return -torch.where(kept, log_likelihood, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_weight is None else d_weight * d_total.to(d_weight.dtype),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Sum over the positions of -log softmax(W h)[target].

    Args:
        hidden: [N, D].
        weight: [V, D].
        target: [N] int64; `IGNORE` leaves a position out.

    Returns:
        A scalar in float32, in float64 for float64 inputs.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, target)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def greedy(hidden: Tensor, weight: Tensor) -> Tensor:
    """Most likely token of every position: [..., D] to [...] int64."""
    rows = hidden.flatten(0, -2)
    best = [(rows[chunk] @ weight.t()).argmax(1) for chunk in _chunks(rows, weight.shape[0])]
    return torch.cat(best).view(hidden.shape[:-1])


def _chunks(rows: Tensor, vocabulary: int) -> list[slice]:
    elements = _CHUNK_ELEMENTS if rows.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    n, size = len(rows), max(16, elements // vocabulary)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["IGNORE", "greedy", "linear_cross_entropy"]
