"""Losses of training and evaluation: next tokens, multi-token prediction (eq. 24, 25), balance.

Shapes: B rows, T positions, D hidden; a row of tokens has T + 1 + depth entries, depth being the number
of multi-token-prediction modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errors import ConfigError
from model.balance_loss import BalanceWeights
from model.block import Pass
from model.experts.protocols import Experts
from model.losses.cross_entropy import IGNORE, greedy, linear_cross_entropy
from model.mtp import MTPModule, draft_acceptance
from model.routing_trace import Trace
from model.transformer import Hidden, Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of one microbatch.

    Attributes:
        total: The differentiable loss; those of all microbatches and workers add up to the step's loss.
        main_sum: Negative log-likelihood of the main model, summed over its targets.
        mtp_sums: Negative log-likelihood of each MTP module, summed over its targets.
        balance: Weighted balance losses of all layers, summed over the rows (a mean per row times B).
    """

    total: Tensor
    main_sum: Tensor
    mtp_sums: tuple[Tensor, ...]
    balance: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of a step's losses, and the counts of the global batch by which they are divided.

    Attributes:
        n_targets: Main targets of the whole global batch, by which MTP losses are divided, too.
        n_rows: Rows of the whole global batch.
        balance: Weights of the balance losses at this step.
        mtp: λ at this step.
    """

    n_targets: int
    n_rows: int
    balance: BalanceWeights
    mtp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Sums over one evaluated batch, so that batches add up.

    Attributes:
        nll: Negative log-likelihood in nats, summed over the targets.
        n_targets: Number of targets.
        accepted: Greedy drafts of each MTP module that are the main model's greedy token.
        drafted: Judged drafts of each MTP module.
    """

    nll: float
    n_targets: int
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]


def targets_of(tokens: Tensor, segments: Tensor | None, *, length: int, ahead: int) -> Tensor:
    """Target of each of the first `length` positions, `ahead` tokens later: [B, length] int64.

    `IGNORE` where the target lies in another document, or where position or target is padding.
    """
    target = tokens[:, ahead : length + ahead].long()
    if segments is None:
        return target
    here, there = segments[:, :length], segments[:, ahead : length + ahead]
    return target.masked_fill((here != there) | (here < 0), IGNORE)


def count_targets(tokens: Tensor, segments: Tensor | None, *, depth: int) -> int:
    """Number of the main model's targets in rows [B, T + 1 + depth], by which `training_loss` is divided."""
    length = _length(tokens, depth)
    if segments is None:
        return tokens.shape[0] * length
    return int((targets_of(tokens, segments, length=length, ahead=1) != IGNORE).sum())


def training_loss(
    model: Transformer,
    tokens: Tensor,
    segments: Tensor | None,
    *,
    experts: Experts,
    trace: Trace,
    weights: LossWeights,
    recompute: bool = False,
) -> Losses:
    """(main + λ/depth · Σ MTP) / n_targets + balance · B / n_rows, eq. 24 and 25 of arXiv 2412.19437.

    Args:
        tokens: [B, T + 1 + depth].
        segments: [B, T + 1 + depth] int32 document of each token, -1 for padding; None when every row is
            one document, the fast path.
        trace: Records this microbatch's routes and loads, or provides them with their counts over the global
            batch (see `route`).
        weights: Weights of the losses at this step, and counts of the global batch.
        recompute: Keep each block's input alone, and compute the block again in the backward pass.

    Raises:
        ConfigError: The rows are too short.
    """
    depth = model.config.num_nextn_predict_layers
    length = _length(tokens, depth)
    hidden, through = _run(
        model, tokens, segments, experts=experts, trace=trace, balance=weights.balance, recompute=recompute
    )
    main_sum = _nll(model, hidden.normed, targets_of(tokens, segments, length=length, ahead=1))
    total = main_sum / weights.n_targets
    per_row = hidden.balance
    mtp_sums: list[Tensor] = []
    for ahead, (draft, loss) in enumerate(drafts(model, tokens, segments, hidden, through), start=2):
        mtp_sums.append(_nll(model, draft, targets_of(tokens, segments, length=length, ahead=ahead)))
        total = total + mtp_sums[-1] * (weights.mtp / depth / weights.n_targets)
        if loss is not None:
            per_row = loss if per_row is None else per_row + loss
    balance_sum = torch.zeros_like(main_sum)
    if per_row is not None:
        balance_sum = per_row * tokens.shape[0]
        total = total + balance_sum / weights.n_rows
    return Losses(
        total=total,
        main_sum=main_sum.detach(),
        mtp_sums=tuple(s.detach() for s in mtp_sums),
        balance=balance_sum.detach(),
    )


@torch.no_grad()
def route(
    model: Transformer, tokens: Tensor, segments: Tensor | None, *, experts: Experts, trace: Trace
) -> None:
    """Record the routes and loads that `training_loss` of the same rows has, without its losses."""
    hidden, through = _run(model, tokens, segments, experts=experts, trace=trace)
    for _ in drafts(model, tokens, segments, hidden, through):
        pass


@torch.no_grad()
def evaluation_loss(
    model: Transformer,
    tokens: Tensor,
    segments: Tensor | None,
    *,
    experts: Experts,
    trace: Trace | None = None,
) -> Evaluation:
    """Evaluate rows [B, T + 1 + depth], with segments of the same shape or None.

    Args:
        trace: Records routes and loads; they count for no update of the bias.
    """
    depth = model.config.num_nextn_predict_layers
    length = _length(tokens, depth)
    hidden, through = _run(model, tokens, segments, experts=experts, trace=trace or Trace())
    target = targets_of(tokens, segments, length=length, ahead=1)
    nll = _nll(model, hidden.normed, target)
    accepted: list[int] = []
    drafted: list[int] = []
    if depth:
        chosen = greedy(hidden.normed, model.lm_head.weight)
        for k, (draft, _) in enumerate(drafts(model, tokens, segments, hidden, through), start=1):
            valid = targets_of(tokens, segments, length=length, ahead=k + 1) != IGNORE
            hits, judged = draft_acceptance(chosen, greedy(draft, model.lm_head.weight), depth=k, valid=valid)
            accepted.append(hits)
            drafted.append(judged)
    return Evaluation(
        nll=float(nll),
        n_targets=int((target != IGNORE).sum()),
        accepted=tuple(accepted),
        drafted=tuple(drafted),
    )


def _length(tokens: Tensor, depth: int) -> int:
    length = tokens.shape[1] - 1 - depth
    if length < 1:
        raise ConfigError(
            f"rows of {tokens.shape[1]} tokens leave no position: with {depth} MTP modules "
            f"(num_nextn_predict_layers) a row needs at least {depth + 2}"
        )
    return length


def _run(
    model: Transformer,
    tokens: Tensor,
    segments: Tensor | None,
    *,
    experts: Experts,
    trace: Trace,
    balance: BalanceWeights | None = None,
    recompute: bool = False,
) -> tuple[Hidden, Pass]:
    length = _length(tokens, model.config.num_nextn_predict_layers)
    rows = tokens[:, :length]
    through = model.start(
        rows,
        experts=experts,
        segments=None if segments is None else segments[:, :length],
        trace=trace,
        balance=balance,
        recompute=recompute,
    )
    return model.run(rows, through), through


def drafts(
    model: Transformer, tokens: Tensor, segments: Tensor | None, hidden: Hidden, through: Pass
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Normed hidden state [B, T, D] and balance loss of each MTP module in turn."""
    config = model.config
    length = hidden.normed.shape[1]
    previous = hidden.normed
    for k, layer in enumerate(config.mtp_layers, start=1):
        module = model.model.layers[layer]
        assert isinstance(module, MTPModule)
        if config.mtp_mode == "parallel":
            yield module.draft(hidden.last, through)
            continue
        if segments is not None:
            # A position whose next token belongs to another document is not counted.
            here, there = segments[:, :length], segments[:, k : length + k]
            through = replace(through, counted=(here == there) & (here >= 0))
        embedded = model.model.embed_tokens(tokens[:, k : length + k])
        previous, loss = module.draft(previous, through, embedded)
        yield previous, loss


def _nll(model: Transformer, hidden: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, target.flatten())


__all__ = [
    "Evaluation",
    "LossWeights",
    "Losses",
    "count_targets",
    "drafts",
    "evaluation_loss",
    "route",
    "targets_of",
    "training_loss",
]
