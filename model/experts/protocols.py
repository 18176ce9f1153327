"""The routed experts as the transformer sees them: it dispatches rows to them, and combines what comes back.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[Any]


class Pending(Protocol):
    """The routed experts' output for one dispatch, possibly still in flight."""

    def combine(self) -> Tensor:
        """Wait for the output and return the gate-weighted sums [N, D]; differentiable."""
        ...


class Experts(Protocol):
    """The routed experts of all MoE layers, given to the transformer from outside."""

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """Send rows [N, D] to the experts idx [N, K] of a layer, with gates [N, K]."""
        ...


class ArrayPending(Protocol):
    """The routed experts' output for a dispatch of arrays."""

    def add_to(self, out: Array) -> None:
        """Wait for the output and add the gate-weighted sums to `out` [N, D]."""
        ...


@runtime_checkable
class ArrayExperts(Protocol):
    """Experts that also take few rows as arrays, from callers that have no tensors."""

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> ArrayPending | None:
        """`Experts.dispatch` for inference; None where `dispatch` has to be called instead."""
        ...


@runtime_checkable
class PairedExperts(Protocol):
    """Experts in other processes that can compute two dispatches of a layer at the same time."""

    @property
    def pair(self) -> tuple[Experts, Experts]:
        """Two independent ways to the same experts, one for each dispatch."""
        ...


@dataclass(frozen=True, slots=True)
class CompletedPending:
    """A `Pending` whose output [N, D] has been computed."""

    partial: Tensor

    def combine(self) -> Tensor:
        return self.partial


__all__ = [
    "Array",
    "ArrayExperts",
    "ArrayPending",
    "CompletedPending",
    "Experts",
    "PairedExperts",
    "Pending",
]
