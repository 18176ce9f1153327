"""The inputs of a training worker for one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.balance_loss import BalanceWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Microbatch:
    """Rows that the model computes at once.

    Attributes:
        index: Among all microbatches of the step, over all workers.
        tokens: `[B, T + 1 + depth]` int64.
        segments: `[B, T + 1 + depth]` int32, document of each token, -1 for padding; None when every row
            is one document.
    """

    index: int
    tokens: Tensor
    segments: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The inputs of one worker for one step.

    Attributes:
        n_targets, n_rows: Counts of the global batch, so that gradients of all workers add up.
        balance: Weights of the balance losses at this step.
        mtp_weight: λ at this step.
        passes: Microbatches of the worker that has most; where passes take all workers, each makes that many.
    """

    step: int
    microbatches: tuple[Microbatch, ...]
    n_targets: int
    n_rows: int
    balance: BalanceWeights
    mtp_weight: float
    passes: int = 0


__all__ = ["Microbatch", "StepInputs"]
