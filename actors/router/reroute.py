"""Where a call of inference goes on when a host is lost to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy.typing as npt
from torch import Tensor

from actors.router.routes import Placement
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError

if TYPE_CHECKING:
    from actors.router.router import Router

_SHORTEST, _LONGEST = 0.05, 1.0
"""Seconds of the first wait for a newer table and of the longest; each is twice the one before."""
MOST_HEDGED: Final = 1  # a call that has turned from a slow host waits for the next one: all may be busy


class Lost(NamedTuple):
    """A host that a call has had no reply from.

    Attributes:
        slow: it may answer yet, but others are asked in its place.
    """

    host: HostInfo
    error: RaymoeError
    slow: bool = False


class Detour:
    """One call's search for a placement.

    First, replicas of the table that there is; then, within the router's patience, a newer table, or the
    hosts that were lost once more as long as the coordinator counts on them: only a connection may be.

    Args:
        idx: [N, K], the experts that the call needs.
    """

    def __init__(self, router: Router, layer: int, idx: Tensor | npt.NDArray[Any]) -> None:
        self._router, self._layer, self._idx = router, layer, idx
        self._lost: set[str] = set()
        self._deadline: float | None = None
        self._wait = _SHORTEST
        self.hedged = 0

    def begin(self) -> Placement:
        """A placement with hosts for all that the call needs.

        Raises:
            ChannelError: there is none within the router's patience.
        """
        held = self._router.route()
        return self._find(
            held,
            ChannelError(f"no live expert host holds some experts that layer {self._layer} wants"),
        )

    def around(self, lost: Sequence[Lost], held: Placement) -> Placement:
        """Another placement than `held`, to send the whole call again with.

        Raises:
            RaymoeError: the first host's error, when there is none within the router's patience.
        """
        for host, error, slow in lost:
            self._lost.add(host.id)
            self.hedged += slow
            if not slow:
                self._router.suspect(host, str(error))
            self._router.shun(host)
        return self._find(held, lost[0].error)

    def _find(self, held: Placement, error: RaymoeError) -> Placement:
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._router.patience
        while True:
            placement = self._router.placement
            if placement.weights != held.weights:  # the trunk has to change with them
                raise error
            placement = placement.without(self._lost)
            if placement.covers(self._layer, self._idx):
                return placement
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise error
            self._router.look_for_newer(min(self._wait, left))
            self._wait = min(2 * self._wait, _LONGEST)
            self._lost.clear()


__all__ = ["MOST_HEDGED", "Detour", "Lost"]
