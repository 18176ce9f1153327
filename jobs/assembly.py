"""Puts a training worker together: weights, trunk, optimizer, and its way to the experts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.expert_host import ExpertHost
from actors.expert_state import MomentSource, SavedMoments
from actors.router import Router
from actors.steps import OptimizerSettings, TrainingPlan
from actors.trunk import Reducer, TrunkWorker
from channels import local
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from jobs.config import RunConfig
from jobs.data import PreparedData
from jobs.hosts import experts_of, host_threads, placement
from jobs.trunk_checkpoint import load_trunk_moments, save_trunk
from jobs.worker import Steps, TrainingWorker
from model.checkpoint import PretrainedSource, RandomSource, WeightSource
from model.optimizer import AdamW
from model.transformer import Transformer

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A worker and what it stands on."""

    worker: TrainingWorker
    trunk: TrunkWorker
    router: Router

    def close(self) -> None:
        """End the lanes' threads and hang up on the hosts."""
        self.trunk.close()
        self.router.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
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


def resolve_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of the weights, the same in every process; `auto` is float32: all arithmetic is on CPUs."""
    return _DTYPES["float32" if config.training.dtype == "auto" else config.training.dtype]


def weight_source(config: RunConfig, start: Start) -> WeightSource:
    """Where trunk and hosts read their weights."""
    if start.weights is not None:
        return PretrainedSource(start.weights, config.model)
    return RandomSource(config.model, config.training.seed, resolve_dtype(config))


def moment_source(start: Start) -> MomentSource | None:
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
    )


def compute_threads(config: RunConfig) -> int:
    """Threads of one operation of a worker, its lanes sharing what the worker has."""
    training = config.training
    cores = training.threads or max(1, (os.cpu_count() or 1) // training.workers)
    return max(1, cores // training.microbatches_in_flight)


def build_host(config: RunConfig, start: Start, index: int) -> ExpertHost:
    """Expert host number `index`, in its own process."""
    return ExpertHost(
        f"host-{index}",
        config.model,
        experts_of(config.model, config.cluster, index),
        weight_source(config, start),
        open_source=lambda directory: PretrainedSource(directory, config.model),
        open_moments=lambda directory: SavedMoments(Path(directory)),
        optimizer=optimizer_settings(config),
        moments=moment_source(start),
        dtype=resolve_dtype(config),
        threads=host_threads(config.cluster),
        step=start.step,
    )


def assemble_worker(
    config: RunConfig,
    data: PreparedData,
    *,
    rank: int,
    start: Start,
    output: Path,
    coordinator: Steps,
    table: RoutingTable | None,
    connect: Callable[[HostInfo], Channel],
    reducer: Reducer | None = None,
) -> Assembled:
    """Build worker number `rank`.

    Args:
        table: of the expert hosts; None keeps the experts in this process.
        connect: opens a channel to a host.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    training, model_config = config.training, config.model
    dtype = resolve_dtype(config)
    source = weight_source(config, start)
    model = Transformer(model_config, dtype=dtype)
    model.load_state_dict(source.trunk())
    settings = optimizer_settings(config)
    optimizer = AdamW(
        model.named_parameters(),
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    if start.moments and start.weights is not None:
        load_trunk_moments(start.weights, optimizer, step=start.step)
    host: ExpertHost | None = None
    if table is None:
        everything = range(model_config.n_routed_experts)
        host = ExpertHost(
            "in-process",
            model_config,
            {layer: everything for layer in model_config.moe_layers},
            source,
            optimizer=settings,
            moments=moment_source(start),
            dtype=dtype,
            step=start.step,
        )
        server = local.serve(host.handle)
        table = RoutingTable(epoch=0, hosts=(HostInfo(id=host.id),), holders=placement(model_config, 0))

        def connect(_: HostInfo) -> Channel:
            return local.connect(server.address)

    router = Router(
        name=f"worker-{rank}",
        run=start.run,
        config=model_config,
        table=table,
        connect=connect,
        lanes=training.microbatches_in_flight,
        timeout=config.cluster.call_timeout,
    )
    trunk = TrunkWorker(
        rank=rank,
        model=model,
        optimizer=optimizer,
        lanes=[router.lane(i) for i in range(training.microbatches_in_flight)],
        reducer=reducer,
        experts=host,
        recompute=training.recompute,
    )
    worker = TrainingWorker(
        config,
        data,
        rank=rank,
        workers=training.workers,
        first_step=start.step,
        output=output,
        trunk=trunk,
        coordinator=coordinator,
        save_trunk=lambda directory: save_trunk(directory, model, optimizer),
        save_experts=None if host is None else lambda directory: host.save(str(directory)),
        reducer=reducer,
    )
    return Assembled(worker=worker, trunk=trunk, router=router)


__all__ = [
    "Assembled",
    "Start",
    "assemble_worker",
    "build_host",
    "compute_threads",
    "moment_source",
    "optimizer_settings",
    "resolve_dtype",
    "training_plan",
    "weight_source",
]
