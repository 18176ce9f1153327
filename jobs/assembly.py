"""Puts a training worker together: weights, trunk, optimizer, and its way to the experts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.clients import HostClient
from actors.coordinator import Coordinator, State
from actors.elastic import Elastic
from actors.expert_host import ExpertHost
from actors.expert_state import MomentSource, SavedMoments
from actors.moves import Peer
from actors.router import Router
from actors.steps import HostControl, OptimizerSettings, TrainingPlan
from actors.timeline import FOLDER, Timeline, profiled
from actors.training_steps import Beginning, TrainingSteps
from actors.trunk import TrunkWorker
from actors.trunk_parameters import Reducer, SingleWorker
from actors.trunk_snapshots import Keeper, TrunkSnapshots
from actors.turns import Turns
from channels import local
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from jobs.checkpoint_store import CheckpointStore, read_state
from jobs.config import RunConfig
from jobs.data import PreparedData
from jobs.hosts import host_threads, placement, shape_of
from jobs.precision import compute_device
from jobs.trunk_checkpoint import load_trunk_moments, save_trunk
from jobs.trunk_parameters import lane_kind, trunk_parameters
from jobs.worker import Steps, TrainingWorker
from model.checkpoint import PretrainedSource, RandomSource, WeightSource
from model.optimizer import value_dtype
from model.sources import gate_biases

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_PATIENCE = 5.0  # seconds in which an evaluation's call finds a host again whose connection was dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A worker and what it stands on."""

    worker: TrainingWorker
    trunk: TrunkWorker
    router: Router
    snapshots: TrunkSnapshots | None = None

    def close(self) -> None:
        """End the lanes' threads and hang up on the hosts."""
        if self.snapshots is not None:
            self.snapshots.close()
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

    def at(self, directory: str) -> Start:
        """The same run begun with another checkpoint of its own; this one for an empty name."""
        if not directory:
            return self
        path = Path(directory)
        return Start(run=self.run, step=read_state(path).step, weights=path, moments=True)


def resolve_dtype(config: RunConfig) -> torch.dtype:
    """The dtype that is computed in, the same in every process."""
    auto = "bfloat16" if config.on_gpus else "float32"
    return _DTYPES[auto if config.training.dtype == "auto" else config.training.dtype]


def worker_device(config: RunConfig) -> torch.device:
    """What a worker computes on that is alone with its GPU; Ray Train says itself what its workers do.

    Raises:
        ResourceError: there is no such device.
    """
    return compute_device(config.training.gpus_per_worker, "training.gpus_per_worker")


def weight_source(config: RunConfig, start: Start) -> WeightSource:
    """Where trunk and hosts read their weights."""
    if start.weights is not None:
        return PretrainedSource(start.weights, config.model)
    return RandomSource(config.model, config.training.seed, value_dtype(resolve_dtype(config)))


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


def build_host(
    config: RunConfig,
    start: Start,
    id: str,
    *,
    connect: Callable[[HostInfo], Peer] = HostClient,
    output: Path | None = None,
) -> ExpertHost:
    """An expert host of this name, in its own process; it holds nothing yet.

    Args:
        output: the run's directory, for a timeline.
        connect: reaches other hosts.
    """

    def open_source(directory: str) -> WeightSource:
        return weight_source(config, start.at(directory))

    def open_moments(directory: str) -> MomentSource:
        source = moment_source(start.at(directory))
        assert source is not None
        return source

    return ExpertHost(
        id,
        config.model,
        {},
        weight_source(config, start),
        open_source=open_source,
        open_moments=open_moments,
        optimizer=optimizer_settings(config),
        dtype=resolve_dtype(config),
        threads=host_threads(config.cluster),
        step=start.step,
        device=compute_device(config.cluster.gpus_per_host, "cluster.gpus_per_host"),
        connect=connect,
        timeline=None if output is None else timeline(config, start, id, output),
    )


def timeline(config: RunConfig, start: Start, process: str, output: Path) -> Timeline | None:
    """What records a process's part of the run's timeline; None where there is none."""
    training = config.training
    if not training.profile_steps:
        return None
    return Timeline(process, profiled(start.step, training.profile_steps, training.steps), output / FOLDER)


def build_coordinator(
    config: RunConfig,
    start: Start,
    output: Path,
    state: State | None = None,
    *,
    control: Callable[[HostInfo], HostControl] | None = None,
) -> Coordinator:
    """The coordinator of a run, in its own process.

    Args:
        output: the run's directory.
        state: of the coordinator before.
        control: how to command a host; None: over gRPC.
    """
    model, cluster = config.model, config.cluster

    def beginning() -> Beginning:
        """The newest checkpoint of this run, or what the run began with."""
        latest = start
        for checkpoint in reversed(CheckpointStore(output / "checkpoints").complete()):
            step = read_state(checkpoint).step
            if step >= start.step:
                latest = Start(run=start.run, step=step, weights=checkpoint, moments=True)
            break
        return Beginning(
            directory="" if latest is start else str(latest.weights),
            step=latest.step,
            moments=latest.moments,
            bias=gate_biases(weight_source(config, latest), model),
        )

    def steps(hosts: Elastic) -> TrainingSteps:
        return TrainingSteps(
            training_plan(config),
            (len(model.moe_layers), model.n_routed_experts),
            hosts if cluster.expert_hosts else None,
            beginning=beginning,
            step=start.step,
            bias=gate_biases(weight_source(config, start), model),
        )

    return Coordinator(
        shape_of(model, cluster),
        hosts=cluster.expert_hosts,
        control=control or partial(HostClient, timeout=cluster.call_timeout),
        moments=start.moments,
        step=start.step,
        steps=steps,
        dead_after=cluster.dead_after,
        rebalance_below=cluster.rebalance_below,
        channel=cluster.channel,
        state=state,
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
    workers: int | None = None,
    reach: Callable[[HostInfo], Keeper] = HostClient,
    mesh: DeviceMesh | None = None,
    device: torch.device | None = None,
) -> Assembled:
    """Build worker number `rank`.

    Args:
        workers: that there are; None takes what the configuration says.
        reach: opens a host's memory.
        table: of the expert hosts; None keeps the experts in this process.
        connect: opens a channel to a host.
        mesh: of the workers, where they share the trunk out.
        device: to compute on; None takes what the configuration reserves.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    training, model_config = config.training, config.model
    dtype = resolve_dtype(config)
    source = weight_source(config, start)
    device = worker_device(config) if device is None else device
    settings = optimizer_settings(config)
    reducer = reducer or SingleWorker()
    parameters = trunk_parameters(
        config, rank=rank, dtype=dtype, device=device, settings=settings, reducer=reducer, mesh=mesh
    )

    def begin_at(at: Start, source: WeightSource) -> None:
        parameters.begin(source, at.step)
        if at.moments and at.weights is not None:
            load_trunk_moments(at.weights, parameters, step=at.step)

    def begin_again(directory: str) -> None:
        at = start.at(directory)
        begin_at(at, weight_source(config, at))

    begin_at(start, source)

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
            device=device,
        )
        server = local.serve(host.handle)
        table = RoutingTable(epoch=0, hosts=(HostInfo(id=host.id),), holders=placement(model_config, 0))

        def connect(_: HostInfo) -> Channel:
            return local.connect(server.address)

    record = timeline(config, start, f"worker-{rank}", output)
    turns = None if host is not None else Turns(lanes_at_once(config))
    router = Router(
        name=f"worker-{rank}",
        run=start.run,
        config=model_config,
        table=table,
        connect=connect,
        lanes=training.microbatches_in_flight,
        timeout=config.cluster.call_timeout,
        patience=min(_PATIENCE, config.cluster.call_timeout),
        turns=turns,
        timeline=record,
        lane=lane_kind(config),
    )
    trunk = TrunkWorker(
        rank=rank,
        workers=workers or training.workers,
        parameters=parameters,
        lanes=[router.lane(i) for i in range(training.microbatches_in_flight)],
        reducer=reducer,
        experts=host,
        turns=turns,
        timeline=record,
        recompute=training.recompute,
    )
    snapshots = None
    if host is None and config.cluster.snapshot_interval:
        snapshots = TrunkSnapshots(parameters, reach, rank=rank)
    worker = TrainingWorker(
        config,
        data,
        rank=rank,
        workers=workers or training.workers,
        first_step=start.step,
        output=output,
        trunk=trunk,
        coordinator=coordinator,
        save_trunk=lambda directory: save_trunk(directory, parameters),
        save_experts=None if host is None else lambda directory: host.save(str(directory)),
        router=None if host is not None else router,
        snapshots=snapshots,
        begin_again=begin_again if host is None else None,
        reducer=reducer,
        patience=config.cluster.start_timeout,
        begun_with=start.weights,
    )
    return Assembled(worker=worker, trunk=trunk, router=router, snapshots=snapshots)


__all__ = [
    "Assembled",
    "Start",
    "assemble_worker",
    "build_coordinator",
    "build_host",
    "compute_threads",
    "moment_source",
    "optimizer_settings",
    "resolve_dtype",
    "timeline",
    "training_plan",
    "weight_source",
    "worker_device",
]
