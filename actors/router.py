"""A router: holds the routing table and one lane for each microbatch in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from actors.lane import Lane, LaneCounters
from channels.base import Channel
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError, StaleEpoch
from model.config import ModelConfig

Connect = Callable[[HostInfo], Channel]
Refresh = Callable[[], RoutingTable]


class Placement:
    """A routing table as a lane uses it: per layer the host of every expert, as a tensor."""

    def __init__(self, table: RoutingTable, config: ModelConfig) -> None:
        if len(table.holders) != len(config.moe_layers):
            raise ProtocolError(
                f"the routing table of epoch {table.epoch} has {len(table.holders)} layers, the model "
                f"{len(config.moe_layers)} with routed experts"
            )
        self.epoch = table.epoch
        self.weights = table.weights
        self.hosts = table.hosts
        self._host_of = {
            layer: torch.tensor([hosts[0] for hosts in row], dtype=torch.int64)
            for layer, row in zip(config.moe_layers, table.holders, strict=True)
        }
        self._trained = -1

    def host_of(self, layer: int) -> Tensor:
        """[E] int64, index into `hosts` of each expert of a layer.

        Raises:
            ProtocolError: the layer has no routed experts.
        """
        try:
            return self._host_of[layer]
        except KeyError:
            raise ProtocolError(
                f"layer {layer} has no routed experts; these have: {sorted(self._host_of)}"
            ) from None

    def trained(self, step: int) -> None:
        """Hosts have taken a FORWARD of this step under this placement."""
        self._trained = max(self._trained, step)

    def has_trained(self, step: int) -> bool:
        """Whether a step has begun under this placement: then it has to end under it."""
        return self._trained == step


class Router:
    """The way from a trunk to the expert hosts.

    Args:
        name: names this router in requests; unique among the routers of a run.
        run: the training run or deployment.
        config: the model.
        table: the routing table to start with.
        connect: opens a channel to a host; called in the thread of the lane that uses it.
        lanes: microbatches in flight.
        refresh: fetches the current routing table after a host has refused an epoch; None: that is an error.
        timeout: seconds to wait for one reply; None waits for ever.
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
        refresh: Refresh | None = None,
        timeout: float | None = None,
    ) -> None:
        self.name = name
        self.run = run
        self.config = config
        self.connect = connect
        self.timeout = timeout
        self._refresh = refresh
        self._lock = threading.Lock()
        self._table = table
        self._placement = Placement(table, config)
        self._lanes = tuple(Lane(self) for _ in range(lanes))

    @property
    def table(self) -> RoutingTable:
        """The routing table in use."""
        return self._table

    @property
    def placement(self) -> Placement:
        """The routing table as tensors."""
        return self._placement

    def lane(self, index: int) -> Lane:
        """The lane of one microbatch in flight: an `Experts` that one thread uses at a time."""
        return self._lanes[index]

    def set_table(self, table: RoutingTable) -> None:
        """Route with another table from the next call on; between steps only."""
        placement = Placement(table, self.config)
        with self._lock:
            self._table, self._placement = table, placement

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
        if self._refresh is None or (step is not None and held.has_trained(step)):
            raise error
        with self._lock:
            if self._placement.epoch == held.epoch:
                table = self._refresh()
                if table.epoch == held.epoch or table.weights != held.weights:
                    raise error
                self._table, self._placement = table, Placement(table, self.config)
            if self._placement.weights != held.weights:
                raise error
            return self._placement

    def counters(self) -> LaneCounters:
        """Sums over the lanes since the router was made."""
        return LaneCounters(
            tokens=sum(lane.counters.tokens for lane in self._lanes),
            rows=sum(lane.counters.rows for lane in self._lanes),
            bytes=sum(lane.counters.bytes for lane in self._lanes),
        )

    def close(self) -> None:
        """Hang up on all hosts."""
        for lane in self._lanes:
            lane.close()


__all__ = ["Connect", "Placement", "Refresh", "Router"]
