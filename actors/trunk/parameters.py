"""How a worker holds the trunk's parameters: all of them, as every other worker does, or a share.

One class for each way: `ReplicatedTrunk` here, `ShardedTrunk` in `actors.trunk.sharded_trunk`.
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
    """The reducer of a run with one worker."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""


class TrunkParameters(Protocol):
    """The trunk's parameters as one worker has them, their gradients, and what moves them."""

    @property
    def model(self) -> Transformer:
        """The trunk, to compute with within `forward`."""
        ...

    @property
    def together(self) -> bool:
        """Whether passes, and `whole`, take all workers: all then make the same ones in the same order."""
        ...

    @property
    def part(self) -> str | None:
        """Name of what this worker leaves with hosts; None where another one leaves the same."""
        ...

    def passing(self) -> AbstractContextManager[None]:
        """Around one pass, forward or forward and backward.

        Raises:
            WorkersLost: the pass takes all workers, and one is gone.
        """
        ...

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> T:
        """A forward pass; `loss` picks from what `work` returns whatever `backward` is called on."""
        ...

    def sum_gradients(self, others: Sequence[Tensor]) -> float:
        """Sum gradients over the workers, `others` in place with them; the squared norm of the trunk's."""
        ...

    def step(self, learning_rate: float, scale: float) -> None:
        """One step of the optimizer, after which there are no gradients."""
        ...

    def begin(self, source: WeightSource, step: int) -> None:
        """Take weights, and no moments, `step` steps into a run.

        Raises:
            CheckpointError: they do not fit.
        """
        ...

    def load_moments(self, read: Callable[[str, str], Tensor], step: int) -> None:
        """Take moments from what gives one by parameter's name and kind (`exp_avg`, `exp_avg_sq`).

        Raises:
            CheckpointError: they do not fit.
        """
        ...

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Values of parameters and buffers in their whole shapes, one after the other."""
        ...

    def whole_moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the parameter, kind, and moment in its whole shape, one after the other."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What has to be kept to come back here, live: values, moments, the gates' bias."""
        ...

    def take(self, part: str | None, state: Mapping[str, Tensor]) -> None:
        """Take from a state that was kept whatever is this worker's.

        Args:
            part: the name under which it was left; None for this worker's own state.
        """
        ...

    def taken(self, step: int) -> None:
        """All parts of a state after so many steps have been taken."""
        ...


class ReplicatedTrunk:
    """Every worker has all parameters, in flat buffers whose gradients are summed once a step.

    Args:
        model: its parameters belong to `optimizer`.
        reducer: sums over the workers.
        leaves: whether this worker leaves copies with hosts; one does.
    """

    def __init__(self, model: Transformer, optimizer: AdamW, reducer: Reducer, *, leaves: bool) -> None:
        self._model, self._optimizer, self._reducer = model, optimizer, reducer
        self._leaves = leaves

    @property
    def model(self) -> Transformer:
        """See `TrunkParameters.model`."""
        return self._model

    @property
    def together(self) -> bool:
        """See `TrunkParameters.together`."""
        return False

    @property
    def part(self) -> str | None:
        """See `TrunkParameters.part`."""
        return TRUNK if self._leaves else None

    def passing(self) -> AbstractContextManager[None]:
        """See `TrunkParameters.passing`."""
        return nullcontext()

    def forward(self, work: Callable[[], T], loss: Callable[[T], Tensor | None]) -> T:
        """See `TrunkParameters.forward`."""
        return work()

    def sum_gradients(self, others: Sequence[Tensor]) -> float:
        """See `TrunkParameters.sum_gradients`."""
        self._reducer.all_reduce([*self._optimizer.gradient_buffers(), *others])
        return self._optimizer.squared_norm()

    def step(self, learning_rate: float, scale: float) -> None:
        """See `TrunkParameters.step`."""
        self._optimizer.step(learning_rate, scale)
        self._optimizer.zero_grad()

    def begin(self, source: WeightSource, step: int) -> None:
        """See `TrunkParameters.begin`."""
        weights = source.trunk()
        self._model.load_state_dict(weights)
        self._optimizer.load_values(weights)
        self._optimizer.reset(step)

    def load_moments(self, read: Callable[[str, str], Tensor], step: int) -> None:
        """See `TrunkParameters.load_moments`."""
        names = self._optimizer.moments()
        moments = {name: (read(name, "exp_avg"), read(name, "exp_avg_sq")) for name in names}
        self._optimizer.load_moments(moments, step=step)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrunkParameters.whole`."""
        yield from self._optimizer.values().items()
        yield from self._model.named_buffers()

    def whole_moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """See `TrunkParameters.whole_moments`."""
        for name, (first, second) in self._optimizer.moments().items():
            yield name, "exp_avg", first
            yield name, "exp_avg_sq", second

    def state(self) -> dict[str, Tensor]:
        """See `TrunkParameters.state`."""
        buffers = {f"group-{at}": buffer for at, buffer in enumerate(self._optimizer.state_buffers())}
        return {**buffers, "bias": self._model.bias()}

    @torch.no_grad()
    def take(self, part: str | None, state: Mapping[str, Tensor]) -> None:
        """See `TrunkParameters.take`."""
        for name, live in self.state().items():
            if name != "bias":
                live.copy_(state[name])
        self._model.set_bias(state["bias"])

    def taken(self, step: int) -> None:
        """See `TrunkParameters.taken`."""
        self._optimizer.round_values()
        self._optimizer.step_count = step
        self._optimizer.zero_grad()


__all__ = ["Reducer", "ReplicatedTrunk", "SingleWorker", "TrunkParameters"]
