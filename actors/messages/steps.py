"""Values of a training step that travel between workers, coordinator and hosts, with their wire forms.

Shapes: L MoE layers (rows in the order of `ModelConfig.moe_layers`), E routed experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from actors.messages.control_codec import tensor_from, tensor_to
from cluster.topology import HostInfo
from model.optimizers.schedule import Schedule
from protos import coordinator_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of AdamW for a host's experts; the learning rate comes with each commit."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Schedules and sizes of a training run, by which the coordinator decides each step.

    Attributes:
        steps: Optimizer steps of the whole run.
        workers: Data-parallel workers that report each step.
        learning_rate: Peak of the warm-up and cosine schedule.
        min_learning_rate_ratio: Last learning rate / peak.
        warmup_steps: Steps of linear warm-up.
        clip_norm: Largest global gradient norm; 0 does not clip.
        strategy: `bias` updates the gates' bias, any other strategy does not.
        update_rate: γ of the bias update (arXiv 2408.15664), over steps.
        center_update: Subtract the mean from the bias update, as torchtitan does and the paper does not.
        checkpoint_interval: Steps between checkpoints; 0 writes only the last one.
        snapshot_interval: Steps between snapshots in the hosts' memory; 0 takes none.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepReport:
    """One worker's sums over a step.

    Attributes:
        worker: Rank of the worker, from 0.
        step: 0-based optimizer step.
        loads: `[L, E]` int64, (token, expert) pairs of this worker's tokens.
        trunk_squared_norm: Squared norm of the all-reduced trunk gradient; counted once, from worker 0.
        local_expert_squared_norm: The same of experts in the workers' processes.
        main_sum: Summed next-token loss in nats.
        mtp_sum: Summed loss of the MTP modules, divided by their number.
        balance_sum: Summed balance loss.
        n_targets: Predicted tokens behind `main_sum`.
        n_rows: Rows (sequences) behind `balance_sum`.
        tokens: Tokens that went through the trunk.
        seconds: Wall-clock time of the step on this worker, without waiting for the decision.
        tokens_routed: (token, layer) pairs that a router dispatched.
        rows_sent: Rows sent to hosts; rows_sent / tokens_routed is the mean of hosts per token.
        bytes: Payload sent and received on channels.
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

    def to_message(self) -> coordinator_pb2.StepReport:
        """This value as a protobuf message."""
        return coordinator_pb2.StepReport(
            worker=self.worker,
            step=self.step,
            loads=tensor_to(self.loads),
            trunk_squared_norm=self.trunk_squared_norm,
            local_expert_squared_norm=self.local_expert_squared_norm,
            main_sum=self.main_sum,
            mtp_sum=self.mtp_sum,
            balance_sum=self.balance_sum,
            n_targets=self.n_targets,
            n_rows=self.n_rows,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_routed=self.tokens_routed,
            rows_sent=self.rows_sent,
            bytes=self.bytes,
        )

    @classmethod
    def from_message(cls, message: coordinator_pb2.StepReport) -> StepReport:
        """The inverse of `to_message`."""
        return cls(
            worker=message.worker,
            step=message.step,
            loads=tensor_from(message.loads),
            trunk_squared_norm=message.trunk_squared_norm,
            local_expert_squared_norm=message.local_expert_squared_norm,
            main_sum=message.main_sum,
            mtp_sum=message.mtp_sum,
            balance_sum=message.balance_sum,
            n_targets=message.n_targets,
            n_rows=message.n_rows,
            tokens=message.tokens,
            seconds=message.seconds,
            tokens_routed=message.tokens_routed,
            rows_sent=message.rows_sent,
            bytes=message.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepDecision:
    """The coordinator's decision on a step, the same for every worker and every repeated report.

    Attributes:
        step: The step that is committed with this decision.
        learning_rate: Learning rate of this step.
        scale: Factor on every gradient, of trunk and experts: 1, or less when clipped.
        grad_norm: Global gradient norm before clipping.
        bias: `[L, E]` float32, the gates' bias for the next step.
        epoch: Placement epoch of the next step.
        checkpoint: Write a checkpoint after this step.
        stop: Stop after this step, and its checkpoint.
        snapshot: Keep the state after this step in memory.
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

    def to_message(self) -> coordinator_pb2.StepDecision:
        """This value as a protobuf message."""
        return coordinator_pb2.StepDecision(
            step=self.step,
            learning_rate=self.learning_rate,
            scale=self.scale,
            grad_norm=self.grad_norm,
            bias=tensor_to(self.bias),
            epoch=self.epoch,
            checkpoint=self.checkpoint,
            stop=self.stop,
            snapshot=self.snapshot,
        )

    @classmethod
    def from_message(cls, message: coordinator_pb2.StepDecision) -> StepDecision:
        """The inverse of `to_message`."""
        return cls(
            step=message.step,
            learning_rate=message.learning_rate,
            scale=message.scale,
            grad_norm=message.grad_norm,
            bias=tensor_from(message.bias),
            epoch=message.epoch,
            checkpoint=message.checkpoint,
            stop=message.stop,
            snapshot=message.snapshot,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Where a worker begins, for the first time or again.

    Attributes:
        attempt: The attempt that the worker is part of: the number of interruptions so far.
        step: The worker's first step.
        trunk: Hosts that have the trunk's state of that step.
        directory: A checkpoint that has the trunk's state, when no host has it; empty for what the run began
            with.
    """

    attempt: int
    step: int
    trunk: tuple[HostInfo, ...]
    directory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Metrics of a committed step, over all workers; losses are means in nats.

    Attributes:
        loss: Loss of the main model, in nats per token.
        mtp_loss: Mean loss of the MTP modules, without its weight.
        balance_loss: Balance losses with their weights.
        max_violation: (largest load - mean) / mean of each MoE layer (MaxVio).
        hosts_per_token: Rows sent per (token, layer); 0 with experts in the workers' processes.
        seconds: The slowest worker's time.
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

    def total(self, mtp_weight: float) -> float:
        """The loss that is minimised: main loss, weighted MTP losses, balance losses.

        Args:
            mtp_weight: λ at this step.
        """
        return self.loss + mtp_weight * self.mtp_loss + self.balance_loss

    def to_json(self) -> dict[str, Any]:
        """These metrics as a dictionary that JSON preserves exactly."""
        return asdict(self)

    def to_message(self) -> coordinator_pb2.StepMetrics:
        """This value as a protobuf message."""
        return coordinator_pb2.StepMetrics(
            step=self.step,
            loss=self.loss,
            mtp_loss=self.mtp_loss,
            balance_loss=self.balance_loss,
            learning_rate=self.learning_rate,
            grad_norm=self.grad_norm,
            scale=self.scale,
            max_violation=self.max_violation,
            tokens=self.tokens,
            seconds=self.seconds,
            hosts_per_token=self.hosts_per_token,
            bytes=self.bytes,
        )

    @classmethod
    def from_message(cls, message: coordinator_pb2.StepMetrics) -> StepMetrics:
        """The inverse of `to_message`."""
        return cls(
            step=message.step,
            loss=message.loss,
            mtp_loss=message.mtp_loss,
            balance_loss=message.balance_loss,
            learning_rate=message.learning_rate,
            grad_norm=message.grad_norm,
            scale=message.scale,
            max_violation=tuple(message.max_violation),
            tokens=message.tokens,
            seconds=message.seconds,
            hosts_per_token=message.hosts_per_token,
            bytes=message.bytes,
        )


__all__ = [
    "OptimizerSettings",
    "Resume",
    "StepDecision",
    "StepMetrics",
    "StepReport",
    "TrainingPlan",
]
