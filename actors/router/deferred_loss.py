"""Lanes of a sharded trunk: a pass that loses a host runs to its end, and raises the error afterwards.

All workers gather each block's parameters and sum its gradients together. A worker that stopped in the middle
of a pass would block the others; so after a loss its calls return zeros, whose results are discarded, and the
error is deferred to `DeferringLane.raise_deferred`.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from actors.router.connections import LaneCounters
from actors.router.lane import Lane, needs_gradient
from actors.router.training_call import TwoWay, dispatched
from errors import RaymoeError, gives_way
from model.device_copies import to_cpu
from model.experts.protocols import Pending

T = TypeVar("T")


class DeferredLoss:
    """The first loss of a lane since it was last raised."""

    def __init__(self) -> None:
        self._loss: RaymoeError | None = None

    def attempt(self, act: Callable[[], T], instead: Callable[[], T]) -> T:
        """Call `act`; or, if a loss is deferred, or `act` raises one, call `instead`.

        Raises:
            RaymoeError: An error for which a step is not repeated.
        """
        if self._loss is None:
            try:
                return act()
            except RaymoeError as error:
                if not gives_way(error):
                    raise
                self._loss = error
        return instead()

    def raise_deferred(self) -> None:
        """Forget the loss.

        Raises:
            RaymoeError: The loss, if there was one.
        """
        loss, self._loss = self._loss, None
        if loss is not None:
            raise loss


class ZeroCall:
    """A training call that sends nothing; its sums and gradients are zeros."""

    def send(self, rows: Tensor, gates: Tensor) -> None:
        """Remember the shapes of rows and gates."""
        # Of one element each: the rows themselves would be kept to the backward pass.
        self._zeros = rows.new_zeros(1), gates.new_zeros(1)
        self._shapes = rows.shape, gates.shape

    def combine(self) -> Tensor:
        """The sums: zeros [N, D]."""
        return self._zeros[0].new_zeros(self._shapes[0])

    def send_gradients(self, d_out: Tensor) -> None:
        """Discard the gradient."""

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients: zeros [N, D] and [N, K]."""
        rows, gates = self._zeros
        return rows.new_zeros(self._shapes[0]), gates.new_zeros(self._shapes[1])


class ZeroExperts:
    """Experts that add zeros: for a pass that a worker makes only because the others make one."""

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """A `Pending` of zeros; gates get gradients as in any other pass: zeros."""
        return dispatched(ZeroCall(), rows, gates, gates.detach())


class DeferringCall:
    """A training call that continues with zeros after a loss of it, or of another call of its lane."""

    def __init__(self, call: TwoWay, deferred: DeferredLoss) -> None:
        self._call, self._deferred = call, deferred
        self._zeros = ZeroCall()

    def send(self, rows: Tensor, gates: Tensor) -> None:
        self._zeros.send(rows, gates)
        self._deferred.attempt(lambda: self._call.send(rows, gates), lambda: None)

    def combine(self) -> Tensor:
        return self._deferred.attempt(self._call.combine, self._zeros.combine)

    def send_gradients(self, d_out: Tensor) -> None:
        self._deferred.attempt(lambda: self._call.send_gradients(d_out), lambda: None)

    def receive_gradients(self) -> tuple[Tensor, Tensor]:
        return self._deferred.attempt(self._call.receive_gradients, self._zeros.receive_gradients)


@dataclass(frozen=True, slots=True)
class _DeferringPending:
    """A `Pending` of inference whose sums are zeros after a loss."""

    pending: Pending
    rows: Tensor
    deferred: DeferredLoss

    def combine(self) -> Tensor:
        return self.deferred.attempt(self.pending.combine, lambda: torch.zeros_like(self.rows))


class DeferringLane:
    """A lane whose passes run to their end after a loss."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._deferred = DeferredLoss()

    @property
    def counters(self) -> LaneCounters:
        """Traffic of this lane."""
        return self._lane.counters

    def begin(self, step: int, microbatch: int) -> None:
        """Start a microbatch: calls from here on carry its number, unique within the step and router."""
        self._lane.begin(step, microbatch)

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """`Lane.dispatch`, but an error for which a step is repeated is deferred."""
        if needs_gradient(rows, gates):
            here_idx, here_gates = to_cpu(idx, gates.detach())
            call = DeferringCall(self._lane.training_call(layer, here_idx), self._deferred)
            return dispatched(call, rows, gates, here_gates)

        pending = self._deferred.attempt(
            lambda: self._lane.dispatch(layer, rows, idx, gates),
            lambda: ZeroExperts().dispatch(layer, rows, idx, gates),
        )
        return _DeferringPending(pending, rows, self._deferred)

    def abandon(self) -> None:
        """Abandon the open calls after an error."""
        self._lane.abandon()

    def raise_deferred(self) -> None:
        """Raise the error that passes have deferred, if there is one, and abandon the open calls."""
        try:
            self._deferred.raise_deferred()
        except RaymoeError:
            self.abandon()
            raise


__all__ = ["DeferredLoss", "DeferringCall", "DeferringLane", "ZeroExperts"]
