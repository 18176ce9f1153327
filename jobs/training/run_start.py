"""Where a run's processes begin, and what its configuration says of their parts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.host.checkpoint_part import MomentSource, SavedMoments
from actors.messages.steps import OptimizerSettings, TrainingPlan
from actors.messages.timeline import FOLDER, Timeline, profiled
from jobs.checkpoints.checkpoint_store import read_state
from jobs.config.device_and_dtype import resolve_dtype
from jobs.config.run_config import RunConfig
from model.checkpoints.pretrained import PretrainedSource, RandomSource, WeightSource
from model.optimizers.adamw import value_dtype

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run begins.

    Attributes:
        run: name of the run, part of every request's id.
        step: optimizer steps that lie behind the weights.
        weights: a checkpoint or Hugging Face directory; None draws random weights by the seed.
        moments: whether `weights` holds the optimizer's state too, to be taken over.
    """

    run: str
    step: int = 0
    weights: Path | None = None
    moments: bool = False

    def at(self, directory: str) -> RunStart:
        """The same run begun with another checkpoint of its own; this one for an empty name."""
        if not directory:
            return self
        path = Path(directory)
        return RunStart(run=self.run, step=read_state(path).step, weights=path, moments=True)


def weight_source(config: RunConfig, start: RunStart) -> WeightSource:
    """Where trunk and hosts read their weights."""
    if start.weights is not None:
        return PretrainedSource(start.weights, config.model)
    return RandomSource(config.model, config.training.seed, value_dtype(resolve_dtype(config)))


def moment_source(start: RunStart) -> MomentSource | None:
    """Where hosts read AdamW's moments; None where a run begins with none."""
    return SavedMoments(start.weights) if start.moments and start.weights is not None else None


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """AdamW's constants, for the hosts."""
    training = config.training
    return OptimizerSettings(
        beta1=training.beta1,
        beta2=training.beta2,
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
    )


def training_plan(config: RunConfig) -> TrainingPlan:
    """What the coordinator has to know."""
    training = config.training
    return TrainingPlan(
        steps=training.steps,
        workers=training.workers,
        learning_rate=training.learning_rate,
        min_learning_rate_ratio=training.min_learning_rate_ratio,
        warmup_steps=training.warmup_steps,
        clip_norm=training.clip_norm or 0.0,
        strategy=config.balance.strategy,
        update_rate=config.balance.update_rate,
        center_update=config.balance.center_update,
        checkpoint_interval=config.checkpoint.interval,
        snapshot_interval=config.cluster.snapshot_interval,
    )


def compute_threads(config: RunConfig) -> int:
    """Threads of one operation of a worker, its lanes sharing what the worker has."""
    return max(1, _cores(config) // lanes_at_once(config))


def lanes_at_once(config: RunConfig) -> int:
    """Lanes of a worker that compute at a time: as many as it has cores, unless it is said.

    All of them where experts are in the process, for then no lane's tokens are ever away.
    """
    training = config.training
    if not config.cluster.expert_hosts:
        return training.microbatches_in_flight
    at_once = training.computing_at_once or _cores(config)
    return min(at_once, training.microbatches_in_flight)


def _cores(config: RunConfig) -> int:
    return config.training.threads or max(1, (os.cpu_count() or 1) // config.training.workers)


def timeline(config: RunConfig, start: RunStart, process: str, output: Path) -> Timeline | None:
    """What records a process's part of the run's timeline; None where there is none."""
    training = config.training
    if not training.profile_steps:
        return None
    return Timeline(process, profiled(start.step, training.profile_steps, training.steps), output / FOLDER)


__all__ = [
    "RunStart",
    "compute_threads",
    "lanes_at_once",
    "moment_source",
    "optimizer_settings",
    "timeline",
    "training_plan",
    "weight_source",
]
