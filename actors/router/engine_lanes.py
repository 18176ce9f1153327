"""The two lanes of an engine, for the two halves of a large step."""

from __future__ import annotations

from torch import Tensor

from actors.router.lane import Array, Lane
from actors.router.mailbox_call import MailboxCall
from actors.router.router import Router
from model.experts.protocols import Experts, Pending


class EngineLanes:
    """Implements `Experts`, `ArrayExperts` and `PairedExperts`; one thread uses it at a time.

    Args:
        router: A router with two lanes, which no other thread uses.
    """

    def __init__(self, router: Router) -> None:
        self._lanes = router.lane(0), router.lane(1)

    @property
    def pair(self) -> tuple[Experts, Experts]:
        return self._lanes

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Both lanes; the first one takes steps that are not halved."""
        return self._lanes

    def begin(self, step: int) -> None:
        """Start a step of the engine: later calls carry its number."""
        for half, lane in enumerate(self._lanes):
            lane.begin(step, half)

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        return self._lanes[0].dispatch(layer, rows, idx, gates)

    def dispatch_arrays(self, layer: int, rows: Array, idx: Array, gates: Array) -> MailboxCall | None:
        return self._lanes[0].dispatch_arrays(layer, rows, idx, gates)

    def abandon(self) -> None:
        """Abandon the open calls of both lanes after an error."""
        for lane in self._lanes:
            lane.abandon()


__all__ = ["EngineLanes"]
