"""Settings of a run's processes, computed from its configuration: optimizer, steps, threads, timeline."""

from __future__ import annotations

import os
from pathlib import Path

from actors.messages.steps import OptimizerSettings, TrainingPlan
from actors.messages.timeline import FOLDER, Timeline, profiled
from jobs.config.run_config import RunConfig
from jobs.training.run_start import RunStart


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """AdamW's constants, for workers and expert hosts."""
    training = config.training
    return OptimizerSettings(
        beta1=training.beta1,
        beta2=training.beta2,
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
    )


def training_plan(config: RunConfig) -> TrainingPlan:
    """The settings of the coordinator that commits the run's steps."""
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
    """Threads of one tensor operation of a worker: its lanes share the worker's cores."""
    return max(1, _cores(config) // lanes_at_once(config))


def lanes_at_once(config: RunConfig) -> int:
    """Number of lanes of a worker that compute at the same time.

    By default as many as the worker has cores. With experts in the worker's process it is the number of
    microbatches in flight, because no lane ever waits for an expert host.
    """
    training = config.training
    if not config.cluster.expert_hosts:
        return training.microbatches_in_flight
    at_once = training.computing_at_once or _cores(config)
    return min(at_once, training.microbatches_in_flight)


def _cores(config: RunConfig) -> int:
    return config.training.threads or max(1, (os.cpu_count() or 1) // config.training.workers)


def timeline(config: RunConfig, start: RunStart, process: str, output: Path) -> Timeline | None:
    """The recorder of one process's part of the run's timeline; None if no steps are profiled."""
    training = config.training
    if not training.profile_steps:
        return None
    return Timeline(process, profiled(start.step, training.profile_steps, training.steps), output / FOLDER)


__all__ = ["compute_threads", "lanes_at_once", "optimizer_settings", "timeline", "training_plan"]
