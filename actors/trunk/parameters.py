"""Trunk parameters of one worker, replicated or sharded.

Two classes implement `TrunkParameters`: `ReplicatedTrunk` here, `ShardedTrunk` in
`actors.trunk.sharded_trunk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from actors.messages.trunk_parts import TRUNK
from model.optimizers.adamw import AdamW
from model.transformer import Transformer
from model.weight_source import WeightSource

T = TypeVar("T")


class Reducer(Protocol):
    """Sums tensors over the data-parallel workers."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers, in place, the same bits on all of them."""
        ...


class SingleWorker:
    """The reducer of a run with one worker, which has nothing to add."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        return None


class TrunkParameters(Protocol):
    """Trunk parameters of one worker, their gradients, and their optimizer."""

    @property
    def model(self) -> Transformer:
        """The trunk; computes within `forward`."""
        ...

    @property
    def together(self) -> bool:
        """Whether passes and `whole` take all workers, which then make the same passes in the same order."""
        ...

    @property
    def part(self) -> str | None:
        """Name of the part that this worker stores with hosts; None if another worker stores the same."""
        ...

    def passing(self) -> AbstractContextManager[None]:
        """Surrounds one pass, forward or forward and backward.

        Raises:
            WorkersLost: The pass takes all workers, and one is gone.
        """
        ...

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> T:
        """Run `work` as a forward pass; `loss` picks the tensor for `backward` from its result."""
        ...

    def sum_gradients(self, others: Sequence[Tensor]) -> float:
        """Sum gradients, and `others` in place, over the workers; the squared norm of the trunk's."""
        ...

    def step(self, learning_rate: float, scale: float) -> None:
        """Apply one step of the optimizer, and drop the gradients."""
        ...

    def begin(self, source: WeightSource, step: int) -> None:
        """Load weights, with zero moments, as of `step` steps into a run.

        Raises:
            CheckpointError: They do not fit the model.
        """
        ...

    def load_moments(self, read: Callable[[str, str], Tensor], step: int) -> None:
        """Load moments.

        Args:
            read: Returns a moment by its parameter's name and its kind (`exp_avg`, `exp_avg_sq`).

        Raises:
            CheckpointError: They do not fit the model.
        """
        ...

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of parameters and buffers in their whole shapes, one after the other."""
        ...

    def whole_moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Names, kinds and values of moments in their whole shapes, one after the other."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The state of a snapshot, not copied: values, moments, the gates' bias."""
        ...

    def take(self, part: str | None, state: Mapping[str, Tensor]) -> None:
        """Load this worker's share of a snapshot.

        Args:
            part: The name under which it was stored; None for this worker's own snapshot.
        """
        ...

    def taken(self, step: int) -> None:
        """Finish loading a snapshot of step `step`, after its last part."""
        ...


class ReplicatedTrunk:
    """Trunk parameters that every worker has in full; gradients are summed once a step, in flat buffers.

    Args:
        model: The trunk, whose parameters belong to `optimizer`.
        reducer: Sums over the workers.
        stores: Whether this worker stores snapshots with hosts; one worker does.
    """

    def __init__(self, model: Transformer, optimizer: AdamW, reducer: Reducer, *, stores: bool) -> None:
        self._model, self._optimizer, self._reducer = model, optimizer, reducer
        self._stores = stores

    @property
    def model(self) -> Transformer:
        return self._model

    @property
    def together(self) -> bool:
        return False

    @property
    def part(self) -> str | None:
        return TRUNK if self._stores else None

    def passing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> T:
        return work()

    def sum_gradients(self, others: Sequence[Tensor]) -> float:
        self._reducer.all_reduce([*self._optimizer.gradient_buffers(), *others])
        return self._optimizer.squared_norm()

    def step(self, learning_rate: float, scale: float) -> None:
        self._optimizer.step(learning_rate, scale)
        self._optimizer.zero_grad()

    def begin(self, source: WeightSource, step: int) -> None:
        weights = source.trunk()
        self._model.load_state_dict(weights)
        self._optimizer.load_values(weights)
        self._optimizer.reset(step)

    def load_moments(self, read: Callable[[str, str], Tensor], step: int) -> None:
        names = self._optimizer.moments()
        moments = {name: (read(name, "exp_avg"), read(name, "exp_avg_sq")) for name in names}
        self._optimizer.load_moments(moments, step=step)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._optimizer.values().items()
        yield from self._model.named_buffers()

    def whole_moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, (first, second) in self._optimizer.moments().items():
            yield name, "exp_avg", first
            yield name, "exp_avg_sq", second

    def state(self) -> dict[str, Tensor]:
        buffers = {f"group-{at}": buffer for at, buffer in enumerate(self._optimizer.state_buffers())}
        return {**buffers, "bias": self._model.bias()}

    @torch.no_grad()
    def take(self, part: str | None, state: Mapping[str, Tensor]) -> None:
        for name, live in self.state().items():
            if name != "bias":
                live.copy_(state[name])
        self._model.set_bias(state["bias"])

    def taken(self, step: int) -> None:
        self._optimizer.round_values()
        self._optimizer.step_count = step
        self._optimizer.zero_grad()


__all__ = ["Reducer", "ReplicatedTrunk", "SingleWorker", "TrunkParameters"]
