"""Which way a worker holds the trunk's parameters: the one place that asks for `training.trunk_sharding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from actors.messages.steps import OptimizerSettings
from actors.router.deferred_loss import EnduringLane
from actors.router.lane import Lane
from actors.router.router import Router
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
        return ReplicatedTrunk(model, flat, reducer, leaves=rank == 0)
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


def lane_kind(config: RunConfig) -> Callable[[Router], Lane]:
    """The lanes that go with it."""
    return Lane if config.training.trunk_sharding == "ddp" else EnduringLane


__all__ = ["lane_kind", "trunk_parameters"]
