"""Lanes of a sharded trunk: a pass that loses a host runs to its end, and says so afterwards.

All workers gather each block's parameters and sum its gradients together. A worker that gave up in the
middle of a pass would leave the others waiting for it; so after a loss its calls answer zeros, nobody uses
what comes of them, and the error waits for `settle`.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from actors.router.lane import Lane
from actors.router.router import Router
from actors.router.training_call import TrainingCall, TwoWay, dispatched
from errors import RaymoeError, gives_way
from model.experts import Pending

T = TypeVar("T")


class Endurance:
    """The first loss of a lane since it was settled."""

    def __init__(self) -> None:
        self._loss: RaymoeError | None = None

    def attempt(self, act: Callable[[], T], instead: Callable[[], T]) -> T:
        """Do something, unless something is lost: then, and when it is lost now, do something else instead.

        Raises:
            RaymoeError: one that a step is not done again for.
        """
        if self._loss is None:
            try:
                return act()
            except RaymoeError as error:
                if not gives_way(error):
                    raise
                self._loss = error
        return instead()

    def settle(self) -> None:
        """Begin anew.

        Raises:
            RaymoeError: what was lost.
        """
        loss, self._loss = self._loss, None
        if loss is not None:
            raise loss


class SilentCall:
    """A call of training that goes nowhere, and whose sums and gradients are zeros."""

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Remember the shapes."""
        # Of one element each: the rows themselves would be kept to the backward pass.
        self._zeros = rows.new_zeros(1), gates.new_zeros(1)
        self._shapes = rows.shape, gates.shape

    def combine(self) -> Tensor:
        """Zeros [N, D]."""
        return self._zeros[0].new_zeros(self._shapes[0])

    def send_gradients(self, d_out: Tensor) -> None:
        """Nobody wants them."""

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """Zeros [N, D] and [N, K]."""
        rows, gates = self._zeros
        return rows.new_zeros(self._shapes[0]), gates.new_zeros(self._shapes[1])


class SilentExperts:
    """Experts that add nothing: for a pass that a worker makes only because the others do."""

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """See `model.experts.Experts.dispatch`. Gates still get gradients, as in any other pass: zeros."""
        return dispatched(SilentCall(), rows, gates, gates.detach())


class EnduringCall:
    """A call of training that turns silent when it, or another of its lane, is lost."""

    def __init__(self, call: TwoWay, endurance: Endurance) -> None:
        self._call, self._endurance = call, endurance
        self._silent = SilentCall()

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """See `TwoWay.send`."""
        self._silent.send(rows, gates)
        self._endurance.attempt(lambda: self._call.send(rows, gates), lambda: None)

    def combine(self) -> Tensor:
        """See `TwoWay.combine`."""
        return self._endurance.attempt(self._call.combine, self._silent.combine)

    def send_gradients(self, d_out: Tensor) -> None:
        """See `TwoWay.send_gradients`."""
        self._endurance.attempt(lambda: self._call.send_gradients(d_out), lambda: None)

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """See `TwoWay.receive_gradients`."""
        return self._endurance.attempt(self._call.receive_gradients, self._silent.receive_gradients)


@dataclass(frozen=True, slots=True)
class _EnduringPending:
    pending: Pending
    rows: Tensor
    endurance: Endurance

    def combine(self) -> Tensor:
        return self.endurance.attempt(self.pending.combine, lambda: torch.zeros_like(self.rows))


class EnduringLane(Lane):
    """A lane whose passes go on after a loss, to no purpose but their end."""

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self._endurance = Endurance()

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """See `Lane.dispatch`; raises nothing that a step is done again for."""

        def send() -> Pending:
            return super(EnduringLane, self).dispatch(layer, rows, idx, gates)

        def silent() -> Pending:
            return SilentExperts().dispatch(layer, rows, idx, gates)

        pending = self._endurance.attempt(send, silent)
        if torch.is_grad_enabled() and (rows.requires_grad or gates.requires_grad):
            return pending  # which endures of itself, and has to be part of the graph: see `SilentExperts`
        return _EnduringPending(pending, rows, self._endurance)

    def settle(self) -> None:
        """See `Lane.settle`."""
        try:
            self._endurance.settle()
        except RaymoeError:
            self.abandon()
            raise

    def _train(self, call: TrainingCall, rows: Tensor, gates: Tensor, here_gates: Tensor) -> Pending:
        return dispatched(EnduringCall(call, self._endurance), rows, gates, here_gates)


__all__ = ["Endurance", "EnduringLane", "SilentExperts"]
