"""The training function of Ray Train: builds a worker, connected to coordinator and hosts, and runs it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
import torch.distributed
from ray.train.torch import get_device
from torch import Tensor

from actors.process_heap import freeze_heap
from actors.rpc.coordinator_client import CoordinatorClient
from actors.trunk.parameters import Reducer, SingleWorker
from cluster.topology import RoutingTable
from errors import RaymoeError, WorkersLost, gives_way
from jobs.config.device_and_dtype import worker_device
from jobs.config.run_config import RunConfig
from jobs.data.corpus import PreparedData
from jobs.fleet.expert_hosts import connector
from jobs.training.run_settings import compute_threads
from jobs.training.run_start import RunStart
from jobs.training.worker_assembly import HostAccess, assemble_worker
from jobs.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_AGAIN_SECONDS = 0.1  # between two requests for a table in which some expert has no host


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that the driver sends to every worker.

    Attributes:
        config: The run's configuration, from `RunConfig.to_dict`.
        data: The run's documents.
        start: Where the run starts.
        output: The run's directory, on storage that all nodes share.
        coordinator: Address of the coordinator.
    """

    config: dict[str, Any]
    data: PreparedData
    start: RunStart
    output: str
    coordinator: str


class ProcessGroupReducer:
    """Sums tensors over the workers with the process group that Ray Train has set up."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in place.

        Raises:
            WorkersLost: A worker is gone.
        """
        try:
            pending = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in pending:
                work.wait()
        except RuntimeError as error:  # gloo's error when a peer is gone
            raise WorkersLost(f"the workers' process group is broken: {error}") from error


def _table(coordinator: CoordinatorClient, config: RunConfig) -> RoutingTable:
    """The routing table, as soon as every expert has a host."""
    deadline = time.monotonic() + config.cluster.start_timeout
    while True:
        try:
            return coordinator.table()
        except RaymoeError as error:
            if not gives_way(error) or time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN_SECONDS)


def _hosts(config: RunConfig, coordinator: CoordinatorClient, device: torch.device) -> HostAccess | None:
    """How to reach the expert hosts; None where the experts are in the worker's process."""
    if not config.cluster.expert_hosts:
        return None
    return HostAccess(table=_table(coordinator, config), connect=connector(config.cluster, device))


def _device(config: RunConfig) -> torch.device:
    """The device of this worker; the workers of a machine see all of its GPUs, and each uses one."""
    device = worker_device(config)  # raises if there is no GPU
    return device if device.type == "cpu" else get_device()


def _mesh(config: RunConfig, workers: int, device: torch.device) -> DeviceMesh | None:
    """The device mesh over Ray Train's process group; None unless the trunk is sharded."""
    if config.training.trunk_sharding == "ddp":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (workers,))


def train_worker(settings: dict[str, Any]) -> None:
    """The training function of Ray Train; `settings["worker"]` is a `WorkerSettings`."""
    given: WorkerSettings = settings["worker"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    config = RunConfig.from_dict(given.config)
    torch.set_num_threads(compute_threads(config))
    coordinator = CoordinatorClient(given.coordinator, timeout=config.cluster.call_timeout)
    try:
        device = _device(config)
        reducer: Reducer = ProcessGroupReducer() if workers > 1 else SingleWorker()
        made = assemble_worker(
            config,
            given.data,
            group=WorkerGroup(
                rank=rank, workers=workers, reducer=reducer, mesh=_mesh(config, workers, device)
            ),
            start=given.start,
            output=Path(given.output),
            coordinator=coordinator,
            hosts=_hosts(config, coordinator, device),
            device=device,
        )
        freeze_heap()
        try:
            made.worker.run()
        finally:
            made.close()
    except WorkersLost:
        raise  # Ray Train restarts all workers
    except Exception as error:
        # The other workers wait for this one's report: tell the coordinator that there will be none.
        text = str(error) if isinstance(error, RaymoeError) else f"{type(error).__name__}: {error}"
        # Not raised, as Ray Train would restart the worker; the driver gets the error from the coordinator.
        try:
            coordinator.fail(f"worker {rank} (process {os.getpid()}): {text}")
        except RaymoeError:
            raise error from None
    finally:
        coordinator.close()


__all__ = ["ProcessGroupReducer", "WorkerSettings", "train_worker"]
