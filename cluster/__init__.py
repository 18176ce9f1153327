"""Topology, placement and their configuration: pure values and decisions, no Ray, no network."""

from __future__ import annotations

from cluster.config import ChannelKind, ClusterConfig
from cluster.placement import Owner, plan_placement
from cluster.topology import HostInfo, RoutingTable, experts_owned

__all__ = [
    "ChannelKind",
    "ClusterConfig",
    "HostInfo",
    "Owner",
    "RoutingTable",
    "experts_owned",
    "plan_placement",
]
