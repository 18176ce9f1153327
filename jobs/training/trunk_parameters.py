"""Which way a worker holds the trunk's parameters: the one place that asks for `training.trunk_sharding`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from actors.messages.steps import OptimizerSettings
from actors.router import Router
from actors.router.deferred_loss import DeferringLane
from actors.trunk.lanes import StepLane
from actors.trunk.parameters import Reducer, ReplicatedTrunk, TrunkParameters
from errors import ResourceError
from jobs.config.run_config import RunConfig
from model.optimizers.adamw import AdamW
from model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def trunk_parameters(
    config: RunConfig,
    *,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    settings: OptimizerSettings,
    reducer: Reducer,
    mesh: DeviceMesh | None,
) -> TrunkParameters:
    """The trunk of worker `rank`, not yet filled with weights.

    Args:
        dtype, device: to compute in and on.
        mesh: of the workers; needed where they share the trunk out.

    Raises:
        ResourceError: it is needed, and missing.
    """
    if config.training.trunk_sharding == "ddp":
        model = Transformer(config.model, dtype=dtype).to(device)
        flat = AdamW(
            model.named_parameters(),
            beta1=settings.beta1,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        return ReplicatedTrunk(model, flat, reducer, stores=rank == 0)
    if mesh is None:
        raise ResourceError("training.trunk_sharding is fsdp, and there is no process group of the workers")
    # Imported on use: half of what a worker's start would take.
    from actors.trunk.sharded_trunk import ShardedTrunk, shard
    from model.optimizers.sharded_adamw import ShardedAdamW

    model, root = shard(config.model, mesh, dtype, device)
    optimizer = ShardedAdamW(
        model.named_parameters(),
        rank=rank,
        parts=mesh.size(),
        beta1=settings.beta1,
        beta2=settings.beta2,
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return ShardedTrunk(model, root, optimizer, reducer)


def step_lanes(config: RunConfig, router: Router) -> list[StepLane]:
    """A router's lanes, one for each microbatch in flight; passes of a sharded trunk run to their end."""
    lanes = [router.lane(index) for index in range(config.training.microbatches_in_flight)]
    if config.training.trunk_sharding == "ddp":
        return list(lanes)
    return [DeferringLane(lane) for lane in lanes]


__all__ = ["step_lanes", "trunk_parameters"]
