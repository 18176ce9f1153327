"""The data-parallel group of a run's trunk workers, as one of them sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.trunk.parameters import Reducer, SingleWorker

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup:
    """One worker's place in the group of trunk workers.

    Attributes:
        rank: Number of this worker, from 0.
        workers: Number of workers in the group.
        reducer: Sums tensors over the workers.
        mesh: Device mesh over the workers; needed with `training.trunk_sharding=fsdp` only.
    """

    rank: int = 0
    workers: int = 1
    reducer: Reducer = field(default_factory=SingleWorker)
    mesh: DeviceMesh | None = None


__all__ = ["WorkerGroup"]
