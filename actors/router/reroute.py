"""Rerouting: the search of an inference call for other hosts when it has lost some."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy.typing as npt
from torch import Tensor

from actors.router.host_map import HostMap
from actors.router.routing import Routing
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError

_SHORTEST: Final = 0.05
_LONGEST: Final = 1.0
"""Seconds of the first wait for a newer table and of the longest; each is twice the one before."""


class Lost(NamedTuple):
    """A host from which a call has had no reply.

    Attributes:
        slow: Whether it was left for a replica (hedging) and may answer yet.
    """

    host: HostInfo
    error: RaymoeError
    slow: bool = False


class Reroute:
    """The loss policy of one inference call: the whole call is sent again, to other hosts.

    Other replicas in the current table come first. Then, for `Routing.patience` seconds, the call waits for a
    newer table or retries the lost hosts, while the table has them: only a connection may be broken.

    Args:
        idx: [N, K], the experts that the call needs.

    Attributes:
        hedged: How often the call has left a slow host.
    """

    def __init__(self, routing: Routing, layer: int, idx: Tensor | npt.NDArray[Any]) -> None:
        self._routing, self._layer, self._idx = routing, layer, idx
        self.hedged = 0
        self._avoided: set[str] = set()
        self._deadline: float | None = None
        self._wait = _SHORTEST
        self._host_map: HostMap | None = None
        self._hedging = False
        self._lost: list[Lost] = []

    def sending(self, host_map: HostMap) -> None:
        """Begin an attempt with this map; losses of the one before are forgotten."""
        self._host_map, self._hedging = host_map, False
        self._lost.clear()

    def limit(self) -> float | None:
        limit, self._hedging = self._routing.reply_limit(self._layer, self.hedged)
        return limit

    def lost(self, host: HostInfo, error: ChannelError) -> bool:
        """Remember the loss: the call is rerouted when all other replies have been read."""
        self._lost.append(Lost(host, error, self._hedging and isinstance(error, ChannelTimeout)))
        return False

    def next_map(self) -> HostMap | None:
        """The map to send the call again with; None if the attempt has lost no host.

        Raises:
            RaymoeError: The error of the first lost host; no map was found in time.
        """
        if not self._lost:
            return None
        assert self._host_map is not None
        return self.around(self._lost, self._host_map)

    def begin(self) -> HostMap:
        """A map with hosts for all experts that the call needs.

        Raises:
            ChannelError: None was found in time.
        """
        return self._find(
            self._routing.route(),
            ChannelError(f"no live expert host holds some experts that layer {self._layer} wants"),
        )

    def around(self, lost: Sequence[Lost], held: HostMap) -> HostMap:
        """Another map than `held`, without the lost hosts.

        Raises:
            RaymoeError: The first host's error; no map was found in time.
        """
        for host, error, slow in lost:
            self._avoided.add(host.id)
            self.hedged += slow
            if not slow:
                self._routing.suspect(host, str(error))
            self._routing.shun(host)
        return self._find(held, lost[0].error)

    def _find(self, held: HostMap, error: RaymoeError) -> HostMap:
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._routing.patience
        while True:
            host_map = self._routing.host_map
            if host_map.weights != held.weights:  # the trunk has to change with them
                raise error
            # A host that other calls shun is taken rather than none.
            for known in (host_map, self._routing.whole_map):
                left_over = known.without(self._avoided)
                if left_over.covers(self._layer, self._idx):
                    return left_over
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise error
            self._routing.look_for_newer(min(self._wait, left))
            self._wait = min(2 * self._wait, _LONGEST)
            self._avoided.clear()


__all__ = ["Lost", "Reroute"]
