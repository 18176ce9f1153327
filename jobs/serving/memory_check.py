"""Whether this machine can hold what a deployment needs, told before anything starts."""

from __future__ import annotations

import torch

from jobs.checkpoints.memory_need import MemoryNeed, check_memory, free_memory, serving_need
from jobs.serving.config import ServeConfig
from model.config import ModelConfig


def check_serving(
    config: ServeConfig, model: ModelConfig, dtype: torch.dtype, *, free: int | None = None
) -> None:
    """Refuse to serve on this machine what it cannot hold.

    Args:
        dtype: of weights and cache.
        free: bytes that there are; None looks.

    Raises:
        ResourceError: in one line.
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
    """The fields that would help."""
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
