"""Sharded trunk parameters: each worker has rows of every parameter, and all gather a block to compute.

Blocks, MTP modules, and what is left (embedding, final norm, head) are groups of torch's `fully_shard`:
a group's parameters are gathered in one collective, and its gradients summed in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from actors.messages.trunk_parts import part_name, part_of
from actors.trunk.parameters import Reducer
from errors import CheckpointError, WorkersLost
from model.checkpoints.meta_device import meta_device
from model.config import ModelConfig
from model.moe import Gate
from model.mtp import MTPModule
from model.optimizers.adamw import value_dtype
from model.optimizers.sharded_adamw import KINDS, VALUE, ShardedAdamW
from model.transformer import Transformer
from model.weight_source import WeightSource

T = TypeVar("T")


class _Root(nn.Module):
    """A pass through the trunk; within its `forward`, embedding, final norm and head are whole."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> tuple[T, Tensor | None]:
        result = work()
        # A tensor beside the result: `fully_shard` looks for the tensors that a backward pass begins with.
        return result, loss(result)


def shard(
    config: ModelConfig, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device
) -> tuple[Transformer, nn.Module]:
    """A trunk of which this worker holds its rows, not yet filled; and the module for its passes.

    Args:
        mesh: One-dimensional device mesh of the workers, of the device's kind.
        dtype: Type to compute in; in half precision, gathered parameters have it and shards are float32.
    """
    values = value_dtype(dtype)
    policy = MixedPrecisionPolicy()
    if values != dtype:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=values, cast_forward_inputs=False)
    with meta_device():
        model = Transformer(config, dtype=values)
    root = _Root(model)
    groups: list[Any] = []
    for layer in model.model.layers:
        if values != dtype:  # gates compute in float32 always
            groups += [
                fully_shard(module, mesh=mesh) for module in layer.modules() if isinstance(module, Gate)
            ]
        groups.append(fully_shard(layer, mesh=mesh, mp_policy=policy))
        if isinstance(layer, MTPModule):
            register_fsdp_forward_method(layer, "draft")
    groups.append(fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=True))
    for group in groups:
        # Losses are divided by counts of the global batch, so gradients are summed, not averaged.
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    root.to_empty(device=device)
    model.tie()
    return model, root


class ShardedTrunk:
    """Trunk parameters of which every worker has its rows.

    Every worker has to make the same passes in the same order, since otherwise all of them wait without end.

    Args:
        model, root: The model, and the module for its passes, from `shard`.
        optimizer: Optimizer of the model's parameters.
        reducer: Sums over the same workers.
    """

    def __init__(
        self, model: Transformer, root: nn.Module, optimizer: ShardedAdamW, reducer: Reducer
    ) -> None:
        self._model, self._root, self._optimizer, self._reducer = model, root, optimizer, reducer

    @property
    def model(self) -> Transformer:
        return self._model

    @property
    def together(self) -> bool:
        return True

    @property
    def part(self) -> str | None:
        return part_name(self._optimizer.rank, self._optimizer.parts)

    @contextmanager
    def passing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _of_the_group(error):
                raise
            raise WorkersLost(f"the workers' process group is broken: {error}") from error

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> T:
        result, _ = self._root(work, loss)
        return cast("T", result)

    def sum_gradients(self, others: Sequence[Tensor]) -> float:
        # The trunk's own gradients were summed in the backward passes.
        squared = torch.tensor([self._optimizer.squared_norm()], dtype=torch.float64)
        self._reducer.all_reduce([squared, *others])
        return float(squared)

    def step(self, learning_rate: float, scale: float) -> None:
        self._optimizer.step(learning_rate, scale)
        self._optimizer.zero_grad()

    @torch.no_grad()
    def begin(self, source: WeightSource, step: int) -> None:
        buffers = dict(self._model.named_buffers())
        missing = {*self._optimizer.shapes(), *buffers}
        for name, tensor in source.trunk_tensors():
            if name in buffers:
                buffers[name].copy_(tensor)
            else:
                self._optimizer.load(name, VALUE, tensor)
            missing.discard(name)
        if missing:
            raise CheckpointError(f"{min(missing)} is missing, the model needs it")
        self._optimizer.reset(step)

    def load_moments(self, read: Callable[[str, str], Tensor], step: int) -> None:
        for name in self._optimizer.shapes():
            for kind in KINDS:
                self._optimizer.load(name, kind, read(name, kind))
        self._optimizer.step_count = step

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._gathered(VALUE)
        yield from self._model.named_buffers()

    def whole_moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for kind in KINDS:
            for name, moment in self._gathered(kind):
                yield name, kind, moment

    def state(self) -> dict[str, Tensor]:
        return {**self._optimizer.local(), "bias": self._model.bias()}

    def take(self, part: str | None, state: Mapping[str, Tensor]) -> None:
        of = part_of(part or self.part or "")
        if of is None:
            raise CheckpointError(f"{part} is no part of a sharded trunk")
        self._optimizer.take(state, rank=of[0], parts=of[1])
        self._model.set_bias(state["bias"])

    def taken(self, step: int) -> None:
        self._optimizer.step_count = step
        self._optimizer.zero_grad()

    def _gathered(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        with self.passing():
            for name, tensor in self._optimizer.whole(kind):
                yield name, tensor.cpu()


def _of_the_group(error: RuntimeError) -> bool:
    """Whether an error says that another worker is gone: gloo has no class for it, only a text."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


__all__ = ["ShardedTrunk", "shard"]
