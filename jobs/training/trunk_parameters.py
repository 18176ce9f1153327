"""The trunk's parameters and lanes of a worker, whole or sharded as `training.trunk_sharding` says."""

from __future__ import annotations

import torch

from actors.router import Router
from actors.router.deferred_loss import DeferringLane
from actors.trunk.lanes import StepLane
from actors.trunk.parameters import ReplicatedTrunk, TrunkParameters
from errors import ResourceError
from jobs.config.run_config import RunConfig
from jobs.training.run_settings import optimizer_settings
from jobs.training.worker_group import WorkerGroup
from model.optimizers.adamw import AdamW
from model.transformer import Transformer


def trunk_parameters(
    config: RunConfig, group: WorkerGroup, *, dtype: torch.dtype, device: torch.device
) -> TrunkParameters:
    """The trunk of one worker, not yet filled with weights.

    Args:
        group: The worker's place among the workers.
        dtype: The type that the trunk computes in.
        device: The device that it computes on.

    Raises:
        ResourceError: `training.trunk_sharding=fsdp` needs a process group, and there is none.
    """
    settings = optimizer_settings(config)
    if config.training.trunk_sharding == "ddp":
        model = Transformer(config.model, dtype=dtype).to(device)
        flat = AdamW(
            model.named_parameters(),
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        return ReplicatedTrunk(model, flat, group.reducer, stores=group.rank == 0)
    if group.mesh is None:
        raise ResourceError("training.trunk_sharding is fsdp, and there is no process group of the workers")
    # Imported on use: it would double the time that a worker takes to start.
    from actors.trunk.sharded_trunk import ShardedTrunk, shard
    from model.optimizers.sharded_adamw import ShardedAdamW

    model, root = shard(config.model, group.mesh, dtype, device)
    optimizer = ShardedAdamW(
        model.named_parameters(),
        rank=group.rank,
        parts=group.mesh.size(),
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return ShardedTrunk(model, root, optimizer, group.reducer)


def step_lanes(config: RunConfig, router: Router) -> list[StepLane]:
    """A router's lanes, one for each microbatch in flight; passes of a sharded trunk run to their end."""
    lanes = [router.lane(index) for index in range(config.training.microbatches_in_flight)]
    if config.training.trunk_sharding == "ddp":
        return list(lanes)
    return [DeferringLane(lane) for lane in lanes]


__all__ = ["step_lanes", "trunk_parameters"]
