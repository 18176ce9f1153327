"""The routing of one router: its routing table, which its lanes share and which may change at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Protocol

from actors.router.host_map import HostMap
from cluster.topology import HostInfo, RoutingTable
from errors import RaymoeError, StaleEpoch
from model.config import ModelConfig

_SHUNNED: Final = 5.0
"""Seconds for which calls avoid a host that was lost to one of them and is still in the routing table."""
_MAX_HEDGED: Final = 1  # a call that has left one slow host waits for the next one: all may be busy


class Tables(Protocol):
    """A source of newer routing tables, such as the coordinator."""

    def newest(self, weights: str) -> RoutingTable:
        """The current table of a version of the weights.

        Raises:
            RaymoeError: The coordinator is unreachable, or has no table for these weights.
        """
        ...

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        """Wait up to `timeout` seconds for a table with a greater serial; None if there is none.

        Raises:
            RaymoeError: The coordinator is unreachable, or has no table for these weights.
        """
        ...

    def suspect(self, host_id: str, why: str) -> None:
        """Report that a call to this host was lost; returns at once and never raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Settings of a router.

    Attributes:
        lanes: Number of microbatches in flight.
        timeout: Seconds to wait for one reply; None waits without a limit.
        patience: Seconds for which a call of inference looks for hosts of its experts after one was lost.
        hedge_after: Seconds after which a call of inference leaves a slow host for replicas of its experts,
            where all experts of the layer have some; None never does.
        watch: Whether a thread waits for newer tables, installs them, and ends the waits for hosts that are
            in the table no longer.
    """

    lanes: int = 1
    timeout: float | None = None
    patience: float = 0.0
    hedge_after: float | None = None
    watch: bool = False


HostsChanged = Callable[[Collection[str], Collection[str]], None]
"""Called with the ids of hosts that have left the routing table, and of those that are in it."""


class Routing:
    """The current routing table, and the rules for replacing it.

    Args:
        table: The routing table to start with.
        config: The model.
        settings: Timeouts of calls.
        tables: Source of newer tables; None if there are none.

    Attributes:
        timeout, patience: See `RouterSettings`.
    """

    def __init__(
        self, table: RoutingTable, config: ModelConfig, settings: RouterSettings, tables: Tables | None
    ) -> None:
        self._config, self._tables = config, tables
        self.timeout, self.patience = settings.timeout, settings.patience
        self._hedge_after = settings.hedge_after
        self._lock = threading.Lock()
        self._table = table
        self._whole = self._host_map = HostMap(table, config)  # the second lacks the shunned hosts
        self._readmit_at = 0.0
        self._pinned: tuple[int, HostMap] | None = None
        self._listeners: list[HostsChanged] = []

    @property
    def table(self) -> RoutingTable:
        """The routing table in use."""
        return self._table

    @property
    def host_map(self) -> HostMap:
        """The routing table as tensors, without the hosts that are shunned at the moment."""
        return self._host_map

    @property
    def whole_map(self) -> HostMap:
        """The routing table as tensors, with the hosts that are shunned at the moment."""
        return self._whole

    def subscribe(self, listener: HostsChanged) -> None:
        """Call `listener` with every change of the table; before other threads use this object."""
        self._listeners.append(listener)

    def replace(self, table: RoutingTable) -> None:
        """Route with another table from the next call on, and drop the pin of a step; between steps only."""
        host_map = HostMap(table, self._config)
        with self._lock:
            self._take(table, host_map)
            self._pinned = None  # a step may be retried, under the new table

    def install(self, table: RoutingTable) -> bool:
        """Route with a newer table of the same weights; whether it is one. Any thread, at any time."""
        with self._lock:
            held = self._table
            newer = (table.serial, table.epoch) > (held.serial, held.epoch)
            if not newer or table.weights != held.weights:
                return False
            self._take(table, HostMap(table, self._config))
            return True

    def route(self) -> HostMap:
        """The map for a new call of inference."""
        if self._host_map is not self._whole and time.monotonic() > self._readmit_at:
            with self._lock:
                self._host_map = self._whole
        return self._host_map

    def pin(self, step: int) -> HostMap:
        """The map for a training call: the same for all calls of a step."""
        with self._lock:
            if self._pinned is None or self._pinned[0] != step:
                self._pinned = step, self._whole
            return self._pinned[1]

    def replan(self, error: StaleEpoch, held: HostMap, *, step: int | None) -> HostMap:
        """A map newer than the one that a host refused.

        Args:
            error: The refusal.
            held: The map of the refused request.
            step: The training step of the request; None for inference.

        Raises:
            StaleEpoch: There is no newer one, or the step has begun under the old one (a step is one
                version), or the new one is of other weights, which the trunk has to change with.
        """
        if self._tables is None or (step is not None and held.has_trained(step)):
            raise error
        with self._lock:
            if self._host_map.epoch == held.epoch:
                table = self._tables.newest(held.weights)
                if table.epoch == held.epoch or table.weights != held.weights:
                    raise error
                self._take(table, HostMap(table, self._config))
            if self._host_map.weights != held.weights:
                raise error
            if step is not None:
                self._pinned = step, self._whole
                return self._whole
            return self._host_map

    def reply_limit(self, layer: int, hedged: int) -> tuple[float | None, bool]:
        """Seconds to wait for a reply of inference, and whether replicas are asked afterwards (hedging).

        Hosts that are shunned count as replicas: they may only be slow, and the one that is waited for hangs.

        Args:
            layer: The layer, by its index in the model.
            hedged: How often the call has left a slow host.
        """
        timeout, hedge_after = self.timeout, self._hedge_after
        if hedge_after is None or not self._whole.replicated(layer):
            return timeout, False
        if hedged >= _MAX_HEDGED or (timeout is not None and timeout <= hedge_after):
            return timeout, False
        return hedge_after, True

    def counts_on(self, host: HostInfo) -> bool:
        """Whether the table has a host."""
        return self._whole.has(host.id)

    def suspect(self, host: HostInfo, why: str) -> None:
        """Report a lost call to the coordinator, unless the host has left the table already."""
        if self._tables is not None and self.counts_on(host):
            self._tables.suspect(host.id, why)

    def shun(self, host: HostInfo) -> None:
        """Let the next calls of inference avoid a host for a while, if every expert has another replica."""
        with self._lock:
            reduced = self._host_map.without({host.id})
            if reduced is not self._host_map and reduced.lacking == self._whole.lacking:
                self._host_map = reduced
                self._readmit_at = time.monotonic() + _SHUNNED

    def look_for_newer(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a newer table and install it; whether one came."""
        if self._tables is None:
            time.sleep(timeout)
            return False
        began, table = time.monotonic(), None
        try:
            table = self._tables.after(self._table.serial, self._table.weights, timeout)
        except RaymoeError:  # the coordinator is away
            time.sleep(max(0.0, began + timeout - time.monotonic()))
        return table is not None and self.install(table)

    def _take(self, table: RoutingTable, host_map: HostMap) -> None:
        """Use a table, and tell the listeners which hosts have left; the lock is held."""
        there = {host.id for host in table.hosts}
        gone = {host.id for host in self._table.hosts} - there
        self._table = table
        self._whole = self._host_map = host_map
        for listener in self._listeners:
            listener(gone, there)


__all__ = ["RouterSettings", "Routing", "Tables"]
