"""Which host gets which experts: pure functions, no I/O."""

from __future__ import annotations

from cluster.topology import Holders
from errors import ConfigError


def plan_placement(n_layers: int, n_experts: int, n_group: int, n_hosts: int) -> Holders:
    """Place the experts of every layer on hosts, groups kept together.

    With at most as many hosts as groups a group never leaves one host, so a token that node-limited
    routing confines to M groups touches at most M hosts (arXiv 2412.19437, section 2.1.2). With more
    hosts than groups a host never holds experts of two groups. Counts differ by at most one group
    (or, within a group, one expert) between the hosts of a layer, and which hosts hold more rotates
    from layer to layer.

    Args:
        n_layers: layers with routed experts.
        n_experts: routed experts of a layer, a multiple of `n_group`.
        n_group: expert groups of the model.
        n_hosts: hosts, 1 or more.

    Returns:
        One holder of each expert; every host holds at least one expert of every layer.

    Raises:
        ConfigError: no host, more hosts than experts, or groups of unequal size.
    """
    if n_hosts < 1:
        raise ConfigError(f"cluster.expert_hosts is {n_hosts}: a placement needs at least 1 host")
    if n_group < 1 or n_experts % n_group:
        raise ConfigError(
            f"model.n_routed_experts ({n_experts}) must be a multiple of model.n_group ({n_group})"
        )
    if n_hosts > n_experts:
        raise ConfigError(
            f"cluster.expert_hosts is {n_hosts}, but a layer has only {n_experts} routed experts "
            f"(model.n_routed_experts): use at most {n_experts} hosts"
        )
    slots = _host_slots(n_experts, n_group, n_hosts)
    even = len({slots.count(host) for host in range(n_hosts)}) == 1
    return tuple(
        tuple((slot if even else (slot + layer) % n_hosts,) for slot in slots) for layer in range(n_layers)
    )


def _host_slots(n_experts: int, n_group: int, n_hosts: int) -> tuple[int, ...]:
    """Host of each expert of one layer."""
    size = n_experts // n_group
    if n_hosts <= n_group:
        # Group g of G goes to host floor(g·H/G): consecutive groups, sizes that differ by at most one.
        return tuple((expert // size) * n_hosts // n_group for expert in range(n_experts))
    slots: list[int] = []
    for group in range(n_group):
        first, last = group * n_hosts // n_group, (group + 1) * n_hosts // n_group
        slots.extend(first + at * (last - first) // size for at in range(size))
    return tuple(slots)


__all__ = ["plan_placement"]
