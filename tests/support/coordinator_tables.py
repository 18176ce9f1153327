"""Routing tables that a test publishes, and a check of what a lane computes with them."""

from __future__ import annotations

import threading
import time

import torch

from actors.router.lane import Lane
from cluster.topology import RoutingTable
from errors import ChannelError
from support.tiny_cluster import LAYERS, local_experts, tokens


class FakeTables:
    """A coordinator's routing tables, and the suspicions reported to it.

    Attributes:
        asked: When a router asked for a newer table, by the monotonic clock.
    """

    def __init__(self, table: RoutingTable) -> None:
        self.table = table
        self.suspects: list[str] = []
        self.asked: list[float] = []
        self.away = False
        self.changed = threading.Condition()

    def newest(self, weights: str) -> RoutingTable:
        return self.table

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        with self.changed:
            self.asked.append(time.monotonic())
            if self.away:
                raise ChannelError("the coordinator is away")
            self.changed.wait_for(lambda: self.table.serial > serial, timeout)
            return self.table if self.table.serial > serial else None

    def suspect(self, host_id: str, why: str) -> None:
        self.suspects.append(host_id)

    def publish(self, table: RoutingTable) -> None:
        with self.changed:
            self.table = table
            self.changed.notify_all()


def check(lane: Lane, seed: int = 1, n: int = 12) -> None:
    """Assert that every layer's sums are the model's."""
    oracle = local_experts()
    with torch.no_grad():
        for layer in LAYERS:
            asked = tokens(n, seed=seed)
            got = lane.dispatch(layer, *asked).combine()
            torch.testing.assert_close(got, oracle.dispatch(layer, *asked).combine(), rtol=0.0, atol=1e-12)
