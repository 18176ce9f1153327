"""AdamW over shards: each worker moves its own rows of every parameter that `fully_shard` has sharded.

The arithmetic is that of `model.optimizers.adamw.AdamW`. A sharded parameter's memory belongs to
`fully_shard`, so tensors stay where they are, and a step is one call over a list of them.

Shapes: a parameter [R, …] lies on n workers in pieces of ceil(R / n) rows; the last may be shorter, or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from errors import CheckpointError
from model.optimizers.adamw import AdamWRule, decays_by_shape, fused_step, squared_sum

VALUE, KINDS = "value", ("exp_avg", "exp_avg_sq")


def rows_of(rank: int, parts: int, size: int) -> range:
    """Rows of a parameter of `size` rows that worker `rank` of `parts` holds; possibly none."""
    each = -(-size // parts)
    return range(min(rank * each, size), min((rank + 1) * each, size))


@dataclass(frozen=True, slots=True)
class _Shard:
    """A parameter, with this worker's rows of its value and moments."""

    parameter: nn.Parameter
    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class ShardedAdamW:
    """`torch.optim.AdamW(fused=True)` for parameters that `fully_shard` has sharded by their rows.

    Args:
        parameters: (name, parameter) pairs, DTensors of one dtype, with unique names.
        rank, parts: This worker, and the number of workers.
        beta1, beta2, epsilon: Coefficients of AdamW.
        weight_decay: Decoupled weight decay of parameters that are matrices as a whole.

    Attributes:
        step_count: Number of steps taken.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        rank: int,
        parts: int,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.rank, self.parts = rank, parts
        self._rules = {
            decays: AdamWRule(
                beta1=beta1, beta2=beta2, epsilon=epsilon, decay=weight_decay if decays else 0.0
            )
            for decays in (True, False)
        }
        self.step_count = 0
        self._shards: dict[str, _Shard] = {}
        for name, parameter in parameters:
            value = _local(parameter.detach())
            self._shards[name] = _Shard(parameter, value, torch.zeros_like(value), torch.zeros_like(value))
        some = next(iter(self._shards.values())).value
        self._step = torch.zeros((), dtype=torch.float32, device=some.device)

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """One AdamW step with gradients times `scale`, the clip factor, > 0."""
        self.step_count += 1
        self._step.fill_(self.step_count)
        for decays, rule in self._rules.items():
            some = [
                shard
                for name, shard in self._shards.items()
                if shard.value.numel() and decays_by_shape(name, shard.parameter) == decays
            ]
            if some:
                fused_step(
                    [shard.value for shard in some],
                    [_gradient(shard) for shard in some],
                    [shard.exp_avg for shard in some],
                    [shard.exp_avg_sq for shard in some],
                    self._step,
                    lr=lr,
                    rule=rule,
                    scale=scale,
                )

    def zero_grad(self) -> None:
        """Drop all gradients; `fully_shard` allocates new ones."""
        for shard in self._shards.values():
            shard.parameter.grad = None

    def squared_norm(self) -> float:
        """Sum of the squared gradients of this worker's rows, in float64; sums of all workers add up."""
        gradients = (shard.parameter.grad for shard in self._shards.values())
        return sum(squared_sum(_local(gradient)) for gradient in gradients if gradient is not None)

    @torch.no_grad()
    def reset(self, step: int) -> None:
        """Set moments to zero, drop gradients, and set the number of steps to `step`."""
        self.step_count = step
        self.zero_grad()
        for shard in self._shards.values():
            shard.exp_avg.zero_()
            shard.exp_avg_sq.zero_()

    def local(self) -> dict[str, Tensor]:
        """Live tensors of this worker's rows, as `name.value`, `name.exp_avg` and `name.exp_avg_sq`."""
        found: dict[str, Tensor] = {}
        for name, shard in self._shards.items():
            for kind in (VALUE, *KINDS):
                found[f"{name}.{kind}"] = getattr(shard, kind)
        return found

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole parameters by name."""
        return {name: shard.parameter.shape for name, shard in self._shards.items()}

    @torch.no_grad()
    def load(self, name: str, kind: str, whole: Tensor) -> None:
        """Copy in this worker's rows of a whole value or moment.

        Raises:
            CheckpointError: The parameter is unknown, or of another shape.
        """
        shard = self._shards.get(name)
        if shard is None or whole.shape != shard.parameter.shape:
            needed = "no such parameter" if shard is None else list(shard.parameter.shape)
            raise CheckpointError(f"{kind} of {name} has shape {list(whole.shape)}, the model needs {needed}")
        rows = rows_of(self.rank, self.parts, whole.shape[0])
        getattr(shard, kind).copy_(whole[rows.start : rows.stop])

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], *, rank: int, parts: int) -> None:
        """Copy in the rows that this worker shares with worker `rank` of `parts`, from its `local`."""
        for name, shard in self._shards.items():
            size = shard.parameter.shape[0]
            mine, theirs = rows_of(self.rank, self.parts, size), rows_of(rank, parts, size)
            begin, end = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
            if begin >= end:
                continue
            for kind in (VALUE, *KINDS):
                rows = tensors[f"{name}.{kind}"][begin - theirs.start : end - theirs.start]
                getattr(shard, kind)[begin - mine.start : end - mine.start].copy_(rows)

    @torch.no_grad()
    def whole(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield whole values or moments, gathered from all workers, which all have to iterate together."""
        for name, shard in self._shards.items():
            like = cast(DTensor, shard.parameter.detach())
            gathered = DTensor.from_local(
                getattr(shard, kind),
                like.device_mesh,
                like.placements,
                shape=like.shape,
                stride=like.stride(),
            )
            yield name, gathered.full_tensor()


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(DTensor, tensor).to_local()


def _gradient(shard: _Shard) -> Tensor:
    gradient = shard.parameter.grad
    # As in `AdamW`: a parameter without a part in the loss has a zero gradient, and decays.
    return torch.zeros_like(shard.value) if gradient is None else _local(gradient)


__all__ = ["KINDS", "VALUE", "ShardedAdamW", "rows_of"]
