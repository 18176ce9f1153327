"""Checks before anything starts whether this machine has enough memory for a deployment."""

from __future__ import annotations

import torch

from jobs.checkpoints.memory_need import MemoryNeed, check_memory, free_memory, serving_need
from jobs.serving.config import ServeConfig
from model.config import ModelConfig


def check_serving(
    config: ServeConfig, model: ModelConfig, dtype: torch.dtype, *, free: int | None = None
) -> None:
    """Check that a model fits into this machine's memory.

    Args:
        config: The configuration of the deployment.
        model: The model.
        dtype: The type of weights and cache.
        free: Bytes of free memory; None determines them.

    Raises:
        ResourceError: It does not; the message advises which fields to change.
    """
    serving, cluster = config.serving, config.cluster
    scaled = serving.autoscaling or {}
    need = serving_need(
        model,
        dtype,
        cache_tokens=serving.cache_tokens,
        replicas=serving.replicas if serving.autoscaling is None else max(1, scaled.get("min_replicas", 1)),
        hosts=cluster.expert_hosts,
        modules=serving.drafts != 0,
    )
    free = free_memory() if free is None else free
    check_memory(need, advice=_advice(need, free, dtype), free=free)


def _advice(need: MemoryNeed, free: int, dtype: torch.dtype) -> str:
    """The changes of the configuration that reduce the need."""
    ways = []
    if need.replicas > 1:
        ways.append("lower serving.replicas")
        if not need.hosts:
            ways.append("set cluster.expert_hosts=1 for the replicas to share the experts")
    if need.total - need.replicas * need.cache <= free:
        ways.append("lower serving.cache_tokens")
    if dtype.itemsize > 2:
        ways.append(f"set serving.dtype={'float32' if dtype.itemsize > 4 else 'bfloat16'}")
    ways.append("spread cluster.expert_hosts over the machines of a cluster with --address")
    return ", or ".join(ways)


__all__ = ["check_serving"]
