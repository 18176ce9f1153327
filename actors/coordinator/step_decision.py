"""What ends a training step: one decision from all workers' reports. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.messages.steps import StepDecision, StepMetrics, StepReport, TrainingPlan
from errors import RaymoeError
from model.balance import max_violation, update_bias
from model.optimizers.schedule import learning_rate, value_at


def decide(
    plan: TrainingPlan,
    reports: Sequence[StepReport],
    bias: Tensor,
    *,
    experts_squared: float,
    epoch: int,
    stop: bool,
    keeps: bool,
) -> StepDecision:
    """One clip factor, learning rate and bias for all.

    Args:
        reports: of all workers, worker 0's first.
        bias: [L, E] that the step was computed with.
        experts_squared: sum over the hosts of their gradients' squares.
        epoch: of the next step.
        stop: after this step.
        keeps: whether hosts keep snapshots.

    Raises:
        RaymoeError: the gradient is not finite.
    """
    first = reports[0]
    step = first.step
    squared = first.trunk_squared_norm + first.local_expert_squared_norm + experts_squared
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    if not math.isfinite(norm):
        raise RaymoeError(
            f"the gradient of step {step} is not finite (norm {norm}): lower training.learning_rate, "
            "or go on from an earlier checkpoint"
        )
    rate = value_at(plan.update_rate, step) if plan.strategy == "bias" else 0.0
    load = total_load(reports)
    last = stop or step + 1 >= plan.steps
    due = plan.checkpoint_interval > 0 and (step + 1) % plan.checkpoint_interval == 0
    return StepDecision(
        step=step,
        learning_rate=learning_rate(
            step,
            peak=plan.learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.steps,
            min_ratio=plan.min_learning_rate_ratio,
        ),
        # As torch.nn.utils.clip_grad_norm_ has it.
        scale=min(1.0, plan.clip_norm / (norm + 1e-6)) if plan.clip_norm > 0 else 1.0,
        grad_norm=norm,
        bias=update_bias(bias, load, rate, center=plan.center_update) if rate else bias,
        epoch=epoch,
        checkpoint=due or last,
        stop=last,
        snapshot=keeps and plan.snapshot_interval > 0 and (step + 1) % plan.snapshot_interval == 0,
    )


def total_load(reports: Sequence[StepReport]) -> Tensor:
    """`[L, E]` int64, over all workers."""
    return torch.stack([report.loads for report in reports]).sum(0)


def merge(reports: Sequence[StepReport], decision: StepDecision) -> StepMetrics:
    """The workers' sums as one step's metrics."""
    targets = max(1, sum(report.n_targets for report in reports))
    rows = max(1, sum(report.n_rows for report in reports))
    routed = max(1, sum(report.tokens_routed for report in reports))
    return StepMetrics(
        step=decision.step,
        loss=sum(report.main_sum for report in reports) / targets,
        mtp_loss=sum(report.mtp_sum for report in reports) / targets,
        balance_loss=sum(report.balance_sum for report in reports) / rows,
        learning_rate=decision.learning_rate,
        grad_norm=decision.grad_norm,
        scale=decision.scale,
        max_violation=tuple(max_violation(total_load(reports)).tolist()),
        tokens=sum(report.tokens for report in reports),
        seconds=max(report.seconds for report in reports),
        hosts_per_token=sum(report.rows_sent for report in reports) / routed,
        bytes=sum(report.bytes for report in reports),
    )


__all__ = ["decide", "merge", "total_load"]
