"""Routes and loads that the forward pass of one microbatch records, and their counts over a global batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.balance import BatchRouting, device_visits
from model.config import ModelConfig


@dataclass(slots=True)
class Trace:
    """Routes and loads by layer; one object per microbatch, used by one thread.

    A layer whose route is present takes that route and counts nothing. So activation recompute routes as the
    first pass did, and no load is counted twice.

    Attributes:
        routes: Chosen experts [N, K] int64 of each layer.
        loads: Tokens per expert [E] int64 of each layer, without padding.
        masks: [N], false on padding, of each layer; None where every token counts.
        batch: Counts of the global batch for each layer, for balance losses; empty where the microbatch is
            the whole batch.
    """

    routes: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    batch: Mapping[int, BatchRouting] = field(default_factory=dict)


def routing_counts(traces: Iterable[Trace], config: ModelConfig) -> Tensor:
    """Loads and visits of all layers over some microbatches: [L, E + D] int64 in the CPU's memory.

    D is `n_group`: DeepSeek-V2's devices are this model's groups.
    """
    n_experts, n_devices = config.n_routed_experts, config.n_group
    counts = torch.zeros(len(config.moe_layers), n_experts + n_devices, dtype=torch.int64)
    for trace in traces:
        for at, layer in enumerate(config.moe_layers):
            idx, mask = trace.routes[layer], trace.masks[layer]
            visits = device_visits(idx, mask, n_experts=n_experts, n_devices=n_devices)
            counts[at] += torch.cat((trace.loads[layer], visits)).cpu()
    return counts


def batch_routing(
    counts: Tensor, config: ModelConfig, *, n_rows: int, device: torch.device
) -> dict[int, BatchRouting]:
    """Counts [L, E + D] of a global batch of `n_rows` rows as balance losses take them, by layer."""
    there, n_experts = counts.to(device), config.n_routed_experts
    return {
        layer: BatchRouting(load=row[:n_experts], visits=row[n_experts:], n_rows=n_rows)
        for layer, row in zip(config.moe_layers, there, strict=True)
    }


__all__ = ["Trace", "batch_routing", "routing_counts"]
