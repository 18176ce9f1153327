"""Topology, placement and their configuration: pure values and decisions, no Ray, no network."""

from __future__ import annotations

from cluster.config import AutoscalingSettings, ChannelKind, ClusterConfig
from cluster.placement import Holding, Placement, Site, balancedness, experts_to_fetch, plan, plan_placement
from cluster.replica_choices import replica_choices
from cluster.topology import Holders, HostInfo, RoutingTable, experts_held

__all__ = [
    "AutoscalingSettings",
    "ChannelKind",
    "ClusterConfig",
    "Holders",
    "Holding",
    "HostInfo",
    "Placement",
    "RoutingTable",
    "Site",
    "balancedness",
    "experts_held",
    "experts_to_fetch",
    "plan",
    "plan_placement",
    "replica_choices",
]
