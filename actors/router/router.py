"""A router: the routing table, and one lane for each microbatch in flight."""

from __future__ import annotations

from actors.router.connections import Connect, Connections, LaneCounters
from actors.router.lane import Lane
from actors.router.lane_turns import LaneWaits
from actors.router.routing import RouterSettings, Routing, Tables
from actors.router.table_updates import TableWatch
from cluster.topology import RoutingTable
from model.config import ModelConfig


class Router:
    """A trunk's connection to the expert hosts.

    Args:
        name: Names this router in requests; unique among the routers of a run.
        run: The training run or deployment.
        config: The model.
        table: The routing table to start with.
        connect: Opens a channel to a host; called in the thread of the lane that uses it.
        settings: Number of lanes, and timeouts.
        tables: Source of newer routing tables; None if there are none.
        waits: Surrounds the waits of lanes for hosts.
    """

    def __init__(
        self,
        name: str,
        run: str,
        config: ModelConfig,
        table: RoutingTable,
        connect: Connect,
        settings: RouterSettings | None = None,
        *,
        tables: Tables | None = None,
        waits: LaneWaits | None = None,
    ) -> None:
        settings = settings or RouterSettings()
        self.name, self.run = name, run
        self.routing = Routing(table, config, settings, tables)
        watch = settings.watch and tables is not None
        lanes = []
        for _ in range(settings.lanes):
            connections = Connections(connect, interruptible=watch, waits=waits)
            self.routing.subscribe(connections.cut)
            lanes.append(Lane(run, name, self.routing, connections))
        self._lanes = tuple(lanes)
        self._watch = None
        if settings.watch and tables is not None:  # once all lanes have subscribed
            self._watch = TableWatch(name, self.routing, tables)

    @property
    def table(self) -> RoutingTable:
        """The routing table in use."""
        return self.routing.table

    def lane(self, index: int) -> Lane:
        """The lane of one microbatch in flight: an `Experts` that one thread uses at a time."""
        return self._lanes[index]

    def set_table(self, table: RoutingTable) -> None:
        """Route with another table from the next call on; between steps only."""
        self.routing.replace(table)

    def counters(self) -> LaneCounters:
        """Sums over the lanes since the router was made."""
        return LaneCounters(
            tokens=sum(lane.counters.tokens for lane in self._lanes),
            rows=sum(lane.counters.rows for lane in self._lanes),
            bytes=sum(lane.counters.bytes for lane in self._lanes),
        )

    def close(self) -> None:
        """Close the channels of all lanes, and end the thread that waits for tables."""
        if self._watch is not None:
            self._watch.close()
        for lane in self._lanes:
            lane.close()


__all__ = ["Router"]
