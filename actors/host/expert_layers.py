"""The experts of one layer on a host: weights, in training also gradients and moments; and copies of layers.

The *parts* of an expert are w13 [2I, D] and w2 [D, I], and with its moments also exp_avg and exp_avg_sq of
w13, then of w2. In training they are the values that AdamW updates, which are float32 where the host
computes in half precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.messages.steps import OptimizerSettings
from model.config import ModelConfig
from model.experts.grouped_swiglu import ExpertShard
from model.optimizers.adamw import AdamW, flat_offsets, value_dtype

Parts = tuple[Tensor, ...]


@dataclass(slots=True, eq=False)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        experts: Global ids, in the order of the shard.
        ids: The same as an array, for compiled functions.
        local_of: [E] int32, global id -> index in the shard, -1 for experts of other hosts.
        shard: The weights.
        optimizer: AdamW over the weights; None in serving.
        step: Number of steps committed.
    """

    experts: tuple[int, ...]
    ids: npt.NDArray[np.int64]
    local_of: npt.NDArray[np.int32]
    shard: ExpertShard
    optimizer: AdamW | None
    step: int

    def parts(self, expert: int, *, moments: bool) -> Parts:
        """Live views of the parts of an expert."""
        at = int(self.local_of[expert])
        if self.optimizer is None:
            return (self.shard.w13[at], self.shard.w2[at])
        values = tuple(value[at] for value in self.optimizer.values().values())
        if not moments:
            return values
        return values + tuple(one[at] for pair in self.optimizer.moments().values() for one in pair)

    def filled(self) -> None:
        """Update the weights used in computation after new values were written to the parts."""
        if self.optimizer is not None:
            self.optimizer.round_values()


ExpertLayers = dict[int, ExpertLayer]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMaker:
    """Makes the layers of a host.

    Attributes:
        config: The model.
        optimizer: Settings of AdamW; None for a host that only infers.
        dtype: Type of the weights, and of the moments unless it is half precision.
        device: Where weights and moments live.
    """

    config: ModelConfig
    optimizer: OptimizerSettings | None
    dtype: torch.dtype
    device: torch.device

    def layer(self, experts: Iterable[int], step: int) -> ExpertLayer:
        """A layer whose weights are yet to be filled; gradients and moments are zero.

        Args:
            step: optimizer steps that the weights have behind them.
        """
        ids = tuple(experts)
        wide, hidden = self.config.moe_intermediate_size, self.config.hidden_size
        w13 = torch.empty(len(ids), 2 * wide, hidden, dtype=self.dtype, device=self.device)
        w2 = torch.empty(len(ids), hidden, wide, dtype=self.dtype, device=self.device)
        local_of = np.full(self.config.n_routed_experts, -1, np.int32)
        local_of[list(ids)] = range(len(ids))
        shard = ExpertShard(w13, w2)
        optimizer = None
        settings = self.optimizer
        if settings is not None:
            optimizer = AdamW(
                [("w13", shard.w13), ("w2", shard.w2)],
                beta1=settings.beta1,
                beta2=settings.beta2,
                epsilon=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
            optimizer.step_count = step
            shard.d_w13, shard.d_w2 = optimizer.gradients["w13"], optimizer.gradients["w2"]
        return ExpertLayer(ids, np.asarray(ids, np.int64), local_of, shard, optimizer, step)


class LayerCopy:
    """A copy of one layer's weights and moments in CPU memory, with the layout of AdamW's buffers.

    Attributes:
        experts: Global ids.
        flat: [3, total]: weights, exp_avg, exp_avg_sq.
    """

    __slots__ = ("_w2", "_w13", "experts", "flat")

    def __init__(self, experts: tuple[int, ...], config: ModelConfig, dtype: torch.dtype) -> None:
        dtype = value_dtype(dtype)
        n, wide, hidden = len(experts), config.moe_intermediate_size, config.hidden_size
        counts = (n * 2 * wide * hidden, n * hidden * wide)
        (first, second), total = flat_offsets(counts, dtype.itemsize)
        self.experts = experts
        self.flat = torch.empty(3, total, dtype=dtype)
        self._w13 = self.flat[:, first : first + counts[0]].view(3, n, 2 * wide, hidden)
        self._w2 = self.flat[:, second : second + counts[1]].view(3, n, hidden, wide)

    def parts(self, expert: int, *, moments: bool) -> Parts:
        """Views of the parts of an expert."""
        at = self.experts.index(expert)
        weights = (self._w13[0, at], self._w2[0, at])
        if not moments:
            return weights
        return (*weights, self._w13[1, at], self._w13[2, at], self._w2[1, at], self._w2[2, at])

    def take(self, layer: ExpertLayer) -> None:
        """Copy the weights and moments of a layer that trains."""
        assert layer.optimizer is not None
        (state,) = layer.optimizer.state_buffers()
        self.flat.copy_(state)


__all__ = ["ExpertLayer", "ExpertLayers", "LayerCopy", "LayerMaker", "Parts"]
