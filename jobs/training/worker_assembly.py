"""Puts a training worker together: weights, trunk, optimizer, and its way to the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.host.expert_host import ExpertHost
from actors.router import Router, RouterSettings
from actors.router.lane_turns import LaneWaits, Turns
from actors.rpc.host_client import HostClient
from actors.trunk import TrunkWorker
from actors.trunk.agreement import WorkersAgreement
from actors.trunk.lanes import LaneThreads
from actors.trunk.parameters import Reducer, SingleWorker
from actors.trunk.snapshots import Keeper, TrunkSnapshots
from channels import local
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from jobs.checkpoints.trunk_checkpoint import load_trunk_moments, save_trunk
from jobs.config.device_and_dtype import resolve_dtype, worker_device
from jobs.config.run_config import RunConfig
from jobs.data.corpus import PreparedData
from jobs.fleet.expert_hosts import placement
from jobs.training.run_start import (
    RunStart,
    lanes_at_once,
    moment_source,
    optimizer_settings,
    timeline,
    weight_source,
)
from jobs.training.trunk_parameters import step_lanes, trunk_parameters
from jobs.training.worker import StepCoordinator, TrainingWorker
from model.checkpoints.pretrained import WeightSource

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


def assemble_worker(
    config: RunConfig,
    data: PreparedData,
    *,
    rank: int,
    start: RunStart,
    output: Path,
    coordinator: StepCoordinator,
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

    def begin_at(at: RunStart, source: WeightSource) -> None:
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
        settings=RouterSettings(
            lanes=training.microbatches_in_flight,
            timeout=config.cluster.call_timeout,
            patience=min(_PATIENCE, config.cluster.call_timeout),
        ),
        waits=None if turns is None and record is None else LaneWaits(turns, record),
    )
    trunk = TrunkWorker(
        agreement=WorkersAgreement(
            rank=rank,
            workers=workers or training.workers,
            reducer=reducer,
            together=parameters.together,
        ),
        parameters=parameters,
        lanes=LaneThreads(step_lanes(config, router), turns),
        experts=host,
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


__all__ = ["Assembled", "assemble_worker"]
