"""Settings of a job's expert hosts, in training and serving: placement, threads, network, channels."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from actors.coordinator.transfer_plan import PlacementSpec
from channels.base import Channel
from channels.choose import reach
from channels.grpc import tls
from cluster.config import ClusterConfig
from cluster.placement import plan_placement
from cluster.topology import Holders, HostInfo, experts_held
from errors import ConfigError
from model.config import ModelConfig


def placement(model: ModelConfig, hosts: int) -> Holders:
    """The first placement, `[L][E]` -> host; with 0 hosts, one host in the process holds all experts."""
    return plan_placement(len(model.moe_layers), model.n_routed_experts, model.n_group, max(1, hosts))


def experts_of(model: ModelConfig, cluster: ClusterConfig, index: int) -> dict[int, tuple[int, ...]]:
    """Ids of the experts of host number `index`, by the index of their layer in the model."""
    return experts_held(placement(model, cluster.expert_hosts), model.moe_layers, index)


def placement_spec(model: ModelConfig, cluster: ClusterConfig) -> PlacementSpec:
    """The experts to place on the hosts, and the number of replicas of each."""
    return PlacementSpec(
        layers=model.moe_layers,
        n_experts=model.n_routed_experts,
        n_group=model.n_group,
        replicas=cluster.replicas,
        redundant=cluster.redundant_experts,
    )


def host_threads(cluster: ClusterConfig) -> int:
    """Compute threads of an expert host; by default its share of this machine's cores."""
    return cluster.threads_per_host or max(1, (os.cpu_count() or 1) // max(1, cluster.expert_hosts))


def on_loopback(cluster: ClusterConfig) -> ClusterConfig:
    """The configuration for a cluster on this machine alone, whose hosts listen on the loopback interface."""
    return cluster if cluster.interface else cluster.model_copy(update={"interface": "127.0.0.1"})


def check_transport(cluster: ClusterConfig) -> None:
    """Check before anything starts that the channel reaches expert hosts, and supports TLS if it is on.

    Raises:
        ConfigError: It does not, or the certificates cannot be read.
    """
    if cluster.channel == "local" and cluster.expert_hosts:
        raise ConfigError(
            "cluster.channel: local stays within a process, and expert hosts have their own; use auto, or "
            "set cluster.expert_hosts to 0"
        )
    folder = tls.directory()
    if folder is None:
        return
    tls.identity(folder)
    if cluster.channel == "collective" and cluster.expert_hosts:
        raise ConfigError(
            f"cluster.channel: collective is not encrypted, and {tls.VARIABLE} is set; use auto, shm or grpc"
        )


def connector(cluster: ClusterConfig, device: torch.device) -> Callable[[HostInfo], Channel]:
    """A function that opens a channel to an expert host.

    Args:
        cluster: The configuration, with the kind of channel.
        device: The device of the rows that are sent.
    """

    def open_channel(host: HostInfo) -> Channel:
        return reach(cluster.channel, host.addresses, timeout=cluster.start_timeout, device=device)

    return open_channel


__all__ = [
    "check_transport",
    "connector",
    "experts_of",
    "host_threads",
    "on_loopback",
    "placement",
    "placement_spec",
]
