"""The expert hosts of a job, in training and serving: what each owns, how they start and are reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from actors.clients import CoordinatorClient
from actors.coordinator import Coordinator
from actors.expert_host import ExpertHost
from actors.remote import CoordinatorActor, ExpertHostActor, ask, start
from channels.base import Channel
from channels.choose import connect, pick
from cluster.config import ClusterConfig
from cluster.placement import plan_placement
from cluster.topology import Holders, HostInfo, experts_held
from model.config import ModelConfig


def placement(model: ModelConfig, hosts: int) -> Holders:
    """`[L][E]` -> host; one host for experts in process."""
    return plan_placement(len(model.moe_layers), model.n_routed_experts, model.n_group, max(1, hosts))


def experts_of(model: ModelConfig, cluster: ClusterConfig, index: int) -> dict[int, tuple[int, ...]]:
    """Model layer index -> ids of the experts of host number `index`."""
    return experts_held(placement(model, cluster.expert_hosts), model.moe_layers, index)


def host_threads(cluster: ClusterConfig) -> int:
    """Threads of an expert host's arithmetic, were all hosts on this machine."""
    return cluster.threads_per_host or max(1, (os.cpu_count() or 1) // max(1, cluster.expert_hosts))


def on_loopback(cluster: ClusterConfig) -> ClusterConfig:
    """The same for a cluster on this machine alone: nobody else needs to reach its hosts."""
    return cluster if cluster.interface else cluster.model_copy(update={"interface": "127.0.0.1"})


def connector(cluster: ClusterConfig) -> Callable[[HostInfo], Channel]:
    """How a lane opens a channel to a host."""

    def open_channel(host: HostInfo) -> Channel:
        return connect(pick(cluster.channel, host.addresses), timeout=cluster.start_timeout)

    return open_channel


@contextmanager
def running_hosts(
    cluster: ClusterConfig, coordinator: Callable[[], Coordinator], hosts: Sequence[Callable[[], ExpertHost]]
) -> Iterator[str]:
    """A coordinator and its expert hosts as actors, which do not outlive the block; its address.

    Args:
        coordinator, hosts: build the plain classes, in the actors' processes.

    Raises:
        RaymoeError: what one of them failed with.
    """
    actors: list[Any] = []
    try:
        # All start at once, then each is waited for.
        actors.append(start(CoordinatorActor, coordinator, interface=cluster.interface))
        for build in hosts:
            reserved = {"cpus": cluster.cpus_per_host, "gpus": cluster.gpus_per_host}
            actors.append(start(ExpertHostActor, build, interface=cluster.interface, **reserved))
        patience = cluster.start_timeout
        address: str = ask(actors[0].address.remote(), what="the coordinator", timeout=patience)
        client = CoordinatorClient(address, timeout=cluster.call_timeout)
        try:
            for index, actor in enumerate(actors[1:]):
                client.register_host(ask(actor.info.remote(), what=f"expert host {index}", timeout=patience))
        finally:
            client.close()
        yield address
    finally:
        for actor in actors:
            ray.kill(actor)


__all__ = ["connector", "experts_of", "host_threads", "on_loopback", "placement", "running_hosts"]
