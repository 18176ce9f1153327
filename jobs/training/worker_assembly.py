"""Builds a training worker: its trunk, optimizer, router, and parts of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.messages.timeline import Timeline
from actors.router import Router, RouterSettings
from actors.router.lane_turns import LaneWaits, Turns
from actors.rpc.host_client import HostClient
from actors.trunk import TrunkWorker
from actors.trunk.agreement import WorkersAgreement
from actors.trunk.lanes import LaneThreads
from actors.trunk.parameters import TrunkParameters
from actors.trunk.snapshots import Keeper, TrunkSnapshots
from channels import local
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from jobs.config.device_and_dtype import resolve_dtype, worker_device
from jobs.config.run_config import RunConfig
from jobs.data.corpus import PreparedData
from jobs.fleet.expert_hosts import placement
from jobs.training.run_settings import lanes_at_once, optimizer_settings, timeline
from jobs.training.run_start import RunStart, moment_source, weight_source
from jobs.training.step_coordinator import StepCoordinator
from jobs.training.trunk_parameters import step_lanes, trunk_parameters
from jobs.training.worker import TrainingWorker
from jobs.training.worker_checkpoints import WorkerCheckpoints, load_trunk
from jobs.training.worker_group import WorkerGroup
from jobs.training.worker_recovery import WorkerRecovery

_PATIENCE = 5.0  # seconds in which an evaluation's call reaches a host again after its connection ended


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAccess:
    """How a worker reaches the expert hosts.

    Attributes:
        table: The routing table to start with.
        connect: Opens a channel to a host.
        reach: Opens a client for the snapshots that a host keeps.
    """

    table: RoutingTable
    connect: Callable[[HostInfo], Channel]
    reach: Callable[[HostInfo], Keeper] = HostClient


@dataclass(frozen=True, slots=True, kw_only=True)
class AssembledWorker:
    """A worker, and the parts of it that have to be closed."""

    worker: TrainingWorker
    trunk: TrunkWorker
    router: Router
    snapshots: TrunkSnapshots | None = None

    def close(self) -> None:
        """End the lanes' threads and close all connections to expert hosts."""
        if self.snapshots is not None:
            self.snapshots.close()
        self.trunk.close()
        self.router.close()


def assemble_worker(
    config: RunConfig,
    data: PreparedData,
    *,
    group: WorkerGroup,
    start: RunStart,
    output: Path,
    coordinator: StepCoordinator,
    hosts: HostAccess | None,
    device: torch.device | None = None,
) -> AssembledWorker:
    """Build one worker of a run.

    Args:
        config, data: The run's configuration and documents.
        group: The worker's place among the workers.
        start, output: Where the run starts, and its directory.
        coordinator: Decides the run's steps.
        hosts: How to reach the expert hosts; None keeps the experts in this process.
        device: The device to compute on; None takes the one that the configuration reserves.

    Raises:
        CheckpointError: The weights do not fit the model.
    """
    device = worker_device(config) if device is None else device
    parameters = trunk_parameters(config, group, dtype=resolve_dtype(config), device=device)
    load_trunk(parameters, config, start)
    experts = _experts_in_process(config, start, device) if hosts is None else None
    access = hosts if experts is None else _access_in_process(config, experts)
    assert access is not None
    record = timeline(config, start, f"worker-{group.rank}", output)
    turns = None if experts is not None else Turns(lanes_at_once(config))
    router = _router(config, start, group, access, turns, record)
    trunk = _trunk(config, group, parameters, router, experts, turns, record)
    checkpoints = WorkerCheckpoints(
        config,
        data,
        group=group,
        start=start,
        output=output,
        trunk=trunk,
        coordinator=coordinator,
        experts=experts,
    )
    snapshots = recovery = None
    if hosts is not None:
        if config.cluster.snapshot_interval:
            snapshots = TrunkSnapshots(parameters, hosts.reach, rank=group.rank)
        recovery = WorkerRecovery(router=router, checkpoints=checkpoints, snapshots=snapshots)
    worker = TrainingWorker(
        config,
        data,
        group=group,
        output=output,
        trunk=trunk,
        coordinator=coordinator,
        checkpoints=checkpoints,
        recovery=recovery,
    )
    return AssembledWorker(worker=worker, trunk=trunk, router=router, snapshots=snapshots)


def _experts_in_process(config: RunConfig, start: RunStart, device: torch.device) -> ExpertHost:
    """A host in this process that holds all experts."""
    everything = range(config.model.n_routed_experts)
    return ExpertHost(
        "in-process",
        config.model,
        InitialExperts(
            source=weight_source(config, start),
            experts={layer: everything for layer in config.model.moe_layers},
            moments=moment_source(start),
            step=start.step,
        ),
        settings=HostSettings(
            optimizer=optimizer_settings(config), dtype=resolve_dtype(config), device=device
        ),
    )


def _access_in_process(config: RunConfig, host: ExpertHost) -> HostAccess:
    server = local.serve(host.handle)
    table = RoutingTable(epoch=0, hosts=(HostInfo(id=host.id),), holders=placement(config.model, 0))
    return HostAccess(table=table, connect=lambda _: local.connect(server.address))


def _router(
    config: RunConfig,
    start: RunStart,
    group: WorkerGroup,
    access: HostAccess,
    turns: Turns | None,
    record: Timeline | None,
) -> Router:
    timeout = config.cluster.call_timeout
    return Router(
        name=f"worker-{group.rank}",
        run=start.run,
        config=config.model,
        table=access.table,
        connect=access.connect,
        settings=RouterSettings(
            lanes=config.training.microbatches_in_flight,
            timeout=timeout,
            patience=min(_PATIENCE, timeout),
        ),
        waits=None if turns is None and record is None else LaneWaits(turns, record),
    )


def _trunk(
    config: RunConfig,
    group: WorkerGroup,
    parameters: TrunkParameters,
    router: Router,
    experts: ExpertHost | None,
    turns: Turns | None,
    record: Timeline | None,
) -> TrunkWorker:
    return TrunkWorker(
        agreement=WorkersAgreement(
            rank=group.rank,
            workers=group.workers,
            reducer=group.reducer,
            together=parameters.together,
        ),
        parameters=parameters,
        lanes=LaneThreads(step_lanes(config, router), turns),
        experts=experts,
        timeline=record,
        recompute=config.training.recompute,
    )


__all__ = ["AssembledWorker", "HostAccess", "assemble_worker"]
