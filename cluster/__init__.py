"""Topology, placement and their configuration: pure values and decisions, no Ray, no network."""

from __future__ import annotations

from cluster.config import ChannelKind, ClusterConfig
from cluster.placement import plan_placement
from cluster.topology import Holders, HostInfo, RoutingTable, experts_held

__all__ = [
    "ChannelKind",
    "ClusterConfig",
    "Holders",
    "HostInfo",
    "RoutingTable",
    "experts_held",
    "plan_placement",
]
