"""The values that travel between workers, coordinator and hosts at the end of a training step.

L MoE layers (rows in the order of `ModelConfig.moe_layers`), E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from actors.messages.transfer_orders import Assembly, Blob, Stored
from cluster.topology import HostInfo
from model.optimizers.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW of a host's experts; the learning rate comes with each commit."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What the coordinator has to know of a training run to decide each step.

    Attributes:
        steps: optimizer steps of the whole run.
        workers: data-parallel workers that report each step.
        learning_rate: peak of warm-up and cosine.
        min_learning_rate_ratio: last learning rate / peak.
        warmup_steps: steps of linear warm-up.
        clip_norm: largest global gradient norm; 0 does not clip.
        strategy: `bias` moves the gates' bias, any other leaves it at what it is.
        update_rate: γ of the bias update (arXiv 2408.15664), over steps.
        center_update: take the mean off the bias update (torchtitan's way, not the paper's).
        checkpoint_interval: steps between checkpoints; 0 writes none but the last.
        snapshot_interval: steps between snapshots in hosts' memory; 0 takes none.
    """

    steps: int
    workers: int
    learning_rate: float
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
    clip_norm: float = 1.0
    strategy: str = "bias"
    update_rate: Schedule = 0.001
    center_update: bool = False
    checkpoint_interval: int = 0
    snapshot_interval: int = 0

    def keeps(self, step: int) -> bool:
        """Whether a snapshot is due after so many steps."""
        return self.snapshot_interval > 0 and step % self.snapshot_interval == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepReport:
    """What one worker did in one step. Sums, so that workers' reports add up.

    Attributes:
        worker: rank of the worker, from 0.
        step: 0-based optimizer step.
        loads: `[L, E]` int64, (token, expert) pairs of this worker's tokens.
        trunk_squared_norm: of the all-reduced trunk gradient; counted once, from worker 0.
        local_expert_squared_norm: of the experts in process (all-reduced); counted once, from worker 0.
        main_sum: summed next-token loss in nats.
        mtp_sum: summed loss of the MTP modules, over their depth.
        balance_sum: summed balance loss.
        n_targets: predicted tokens behind `main_sum`.
        n_rows: rows (sequences) behind `balance_sum`.
        tokens: tokens that went through the trunk.
        seconds: wall-clock time of the step on this worker, without waiting for the report.
        tokens_routed: (token, layer) pairs that a router sent out.
        rows_sent: rows that left for a host; rows_sent / tokens_routed = hosts per token.
        bytes: payload sent and received on channels.
    """

    worker: int
    step: int
    loads: Tensor
    trunk_squared_norm: float = 0.0
    local_expert_squared_norm: float = 0.0
    main_sum: float = 0.0
    mtp_sum: float = 0.0
    balance_sum: float = 0.0
    n_targets: int = 0
    n_rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_routed: int = 0
    rows_sent: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepDecision:
    """What the coordinator decided on a step; the same for every worker and every repeat.

    Attributes:
        step: the step that is committed with this.
        learning_rate: of this step's AdamW.
        scale: factor on every gradient, trunk and experts (1, or less when clipped).
        grad_norm: global norm before clipping.
        bias: `[L, E]` float32, the gates' bias from the next step on.
        epoch: placement epoch of the next step.
        checkpoint: write a checkpoint now, after this step.
        stop: leave the training loop after this step (and its checkpoint).
        snapshot: keep the state after this step in memory.
    """

    step: int
    learning_rate: float
    scale: float
    grad_norm: float
    bias: Tensor
    epoch: int
    checkpoint: bool
    stop: bool
    snapshot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Where a worker begins, for the first time or again.

    Attributes:
        attempt: that it is part of from now on: how often the run has been interrupted.
        step: the first step.
        trunk: hosts that keep the trunk's state of that step.
        directory: a checkpoint that has it, where no host does; empty for what the run began with.
    """

    attempt: int
    step: int
    trunk: tuple[HostInfo, ...]
    directory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One committed step, summed over the workers; losses are means in nats.

    Attributes:
        max_violation: (largest load - mean) / mean of each MoE layer, in their order.
        hosts_per_token: rows that left per (token, layer), 0 with in-process experts.
        seconds: the slowest worker's.
    """

    step: int
    loss: float
    mtp_loss: float
    balance_loss: float
    learning_rate: float
    grad_norm: float
    scale: float
    max_violation: tuple[float, ...]
    tokens: int
    seconds: float
    hosts_per_token: float
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON keeps without loss."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """What an expert host holds and did, for status and for leak tests.

    Attributes:
        step: steps committed so far.
        kept: FORWARDs whose BACKWARD or RELEASE has not come.
        kept_bytes: what they hold.
        parameters: parameters of the host's experts.
        requests: requests answered, by phase name.
        rows: rows computed.
        busy_seconds: spent on computing, summed over threads; waiting is not computing.
        in_flight: requests being handled now.
        epochs: that requests are answered of, the current one among them.
        experts: how many of each layer the current epoch has here.
        failed_pushes: copies of snapshots that did not reach a buddy.
    """

    id: str
    step: int
    epoch: int
    kept: int
    kept_bytes: int
    parameters: int
    requests: dict[str, int]
    rows: int
    busy_seconds: float = 0.0
    in_flight: int = 0
    epochs: tuple[int, ...] = ()
    experts: Mapping[int, int] = field(default_factory=dict)
    failed_pushes: int = 0


class HostControl(Protocol):
    """What the coordinator asks of an expert host: `ExpertHost` itself, or a client of one."""

    def seal(self, step: int, epoch: int | None = None) -> None:
        """Take no more gradients of a step: what `prepare` fetches from other holders is complete."""
        ...

    def prepare(self, step: int, epoch: int | None = None) -> float:
        """Seal the gradients of a step of this epoch; the sum of their squares, in float64."""
        ...

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        """Apply the optimizer step; a repeat does nothing."""
        ...

    def save(self, directory: str, epoch: int | None = None) -> Sequence[str]:
        """Write own experts and moments into a checkpoint; the names of the files written."""
        ...

    def assemble(self, order: Assembly) -> None:
        """Put the experts of a new epoch together beside those in use; a repeat does nothing."""
        ...

    def retain(self, *epochs: int) -> None:
        """Go on with the experts of these epochs, the last above all, and drop every other."""
        ...

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Copy the state aside, and send it to buddies in the background; a repeat does nothing."""
        ...

    def inventory(self) -> Sequence[Stored]:
        """What the host keeps in memory: snapshots, its own and others', and blobs."""
        ...

    def put(self, blob: Blob) -> None:
        """Keep named tensors for a step."""
        ...

    def get(self, name: str, step: int) -> Blob:
        """What was put."""
        ...

    def ping(self, timeout: float) -> None:
        """Answer within so many seconds."""
        ...

    def close(self) -> None:
        """Hang up; calls under way fail."""
        ...

    def loads(self) -> Tensor:
        """[L, E] int64, rows computed for each expert since the host began."""
        ...

    def stats(self) -> HostStats:
        """Counters."""
        ...


__all__ = [
    "HostControl",
    "HostStats",
    "OptimizerSettings",
    "Resume",
    "StepDecision",
    "StepMetrics",
    "StepReport",
    "TrainingPlan",
]
