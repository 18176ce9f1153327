"""A router: holds the routing table and one lane for each microbatch in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from actors.messages.timeline import Timeline
from actors.router.lane import Lane, LaneCounters
from actors.router.lane_turns import Turns
from actors.router.routes import Placement
from actors.router.table_source import Tables
from actors.router.table_watch import Watch
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from errors import RaymoeError, StaleEpoch
from model.config import ModelConfig

Connect = Callable[[HostInfo], Channel]

_SHUNNED: Final = 5.0
"""Seconds that calls go around a host that was lost to one, while the coordinator still counts on it."""


class Router:
    """The way from a trunk to the expert hosts.

    Args:
        name: names this router in requests; unique among the routers of a run.
        run: the training run or deployment.
        config: the model.
        table: the routing table to start with.
        connect: opens a channel to a host; called in the thread of the lane that uses it.
        lanes: microbatches in flight.
        tables: where newer routing tables come from; None: there are none.
        timeout: seconds to wait for one reply; None waits for ever.
        patience: seconds that a call of inference looks for hosts that hold its experts, after one was lost.
        hedge_after: seconds after which a call of inference turns from a host to the replicas of its
            experts, where all of a layer have some; None: it waits.
        turns: of lanes that are threads' work within `Turns.taken`; they let others compute while they wait.
        watch: a thread waits for newer tables, routes by them, and ends what waits for hosts that are gone.
        timeline: records when lanes wait.
        lane: makes a lane; `actors.router.deferred_loss.EnduringLane` for passes that have to come to their
            end.
    """

    def __init__(
        self,
        name: str,
        run: str,
        config: ModelConfig,
        table: RoutingTable,
        connect: Connect,
        lanes: int = 1,
        *,
        tables: Tables | None = None,
        timeout: float | None = None,
        patience: float = 0.0,
        hedge_after: float | None = None,
        watch: bool = False,
        turns: Turns | None = None,
        timeline: Timeline | None = None,
        lane: Callable[[Router], Lane] = Lane,
    ) -> None:
        self.name = name
        self.turns, self.timeline = turns, timeline
        self.run = run
        self.config = config
        self.connect = connect
        self.timeout, self.patience, self.hedge_after = timeout, patience, hedge_after
        self._tables = tables
        self._lock = threading.Lock()
        self._table = table
        self._whole = self._placement = Placement(table, config)  # the second: without shunned hosts
        self._readmit_at = 0.0
        self._pinned: tuple[int, Placement] | None = None
        self._lanes = tuple(lane(self) for _ in range(lanes))
        self._watch = Watch(self, tables) if watch and tables is not None else None

    @property
    def table(self) -> RoutingTable:
        """The routing table in use."""
        return self._table

    @property
    def placement(self) -> Placement:
        """The routing table as tensors."""
        return self._placement

    @property
    def watches(self) -> bool:
        """Whether tables change, and hosts go, while lanes work."""
        return self._watch is not None

    def lane(self, index: int) -> Lane:
        """The lane of one microbatch in flight: an `Experts` that one thread uses at a time."""
        return self._lanes[index]

    def set_table(self, table: RoutingTable) -> None:
        """Route with another table from the next call on; between steps only."""
        placement = Placement(table, self.config)
        with self._lock:
            self._take(table, placement)
            self._pinned = None  # a step may be done again, elsewhere

    def install(self, table: RoutingTable) -> bool:
        """Route with a newer table of the same weights; whether it is one. Any thread, at any time."""
        with self._lock:
            held = self._table
            newer = (table.serial, table.epoch) > (held.serial, held.epoch)
            if not newer or table.weights != held.weights:
                return False
            self._take(table, Placement(table, self.config))
            return True

    def route(self) -> Placement:
        """The placement for a new call of inference."""
        if self._placement is not self._whole and time.monotonic() > self._readmit_at:
            with self._lock:
                self._placement = self._whole
        return self._placement

    def pin(self, step: int) -> Placement:
        """The placement for a training call: the same for all calls of a step."""
        with self._lock:
            if self._pinned is None or self._pinned[0] != step:
                self._pinned = step, self._whole
            return self._pinned[1]

    def replan(self, error: StaleEpoch, held: Placement, *, step: int | None) -> Placement:
        """A placement newer than the one that a host refused.

        Args:
            error: the refusal.
            held: what the refused request was routed with.
            step: the training step of the request; None for inference.

        Raises:
            StaleEpoch: there is none, or the step has begun under the old one (a step is one version), or
                the new one is of other weights, which the trunk's own have to change with.
        """
        if self._tables is None or (step is not None and held.has_trained(step)):
            raise error
        with self._lock:
            if self._placement.epoch == held.epoch:
                table = self._tables.newest(held.weights)
                if table.epoch == held.epoch or table.weights != held.weights:
                    raise error
                self._take(table, Placement(table, self.config))
            if self._placement.weights != held.weights:
                raise error
            if step is not None:
                self._pinned = step, self._whole
                return self._whole
            return self._placement

    def counts_on(self, host: HostInfo) -> bool:
        """Whether the table has a host."""
        return self._whole.has(host.id)

    def suspect(self, host: HostInfo, why: str) -> None:
        """Tell the coordinator of a lost call, unless it knows already that the host is gone."""
        if self._tables is not None and self.counts_on(host):
            self._tables.suspect(host.id, why)

    def shun(self, host: HostInfo) -> None:
        """Let the next calls of inference go around a host for a while, where every expert has another."""
        with self._lock:
            reduced = self._placement.without({host.id})
            if reduced is not self._placement and reduced.lacking == self._whole.lacking:
                self._placement = reduced
                self._readmit_at = time.monotonic() + _SHUNNED

    def look_for_newer(self, timeout: float) -> bool:
        """Wait so many seconds for a newer table; whether one came, and is in use."""
        if self._tables is None:
            time.sleep(timeout)
            return False
        began, table = time.monotonic(), None
        try:
            table = self._tables.after(self._table.serial, self._table.weights, timeout)
        except RaymoeError:  # the coordinator is away
            time.sleep(max(0.0, began + timeout - time.monotonic()))
        return table is not None and self.install(table)

    def counters(self) -> LaneCounters:
        """Sums over the lanes since the router was made."""
        return LaneCounters(
            tokens=sum(lane.counters.tokens for lane in self._lanes),
            rows=sum(lane.counters.rows for lane in self._lanes),
            bytes=sum(lane.counters.bytes for lane in self._lanes),
        )

    def close(self) -> None:
        """Hang up on all hosts."""
        if self._watch is not None:
            self._watch.close()
        for lane in self._lanes:
            lane.close()

    def _take(self, table: RoutingTable, placement: Placement) -> None:
        """Under the lock: use a table, and end what waits for hosts that are only in the one before."""
        there = {host.id for host in table.hosts}
        gone = {host.id for host in self._table.hosts} - there
        self._table = table
        self._whole = self._placement = placement
        for lane in self._lanes:
            lane.cut(gone, there)


__all__ = ["Connect", "Placement", "Router", "Tables"]
