"""Who holds which experts: the values that a coordinator hands to its routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Holders = tuple[tuple[tuple[int, ...], ...], ...]
"""`[n_layers][n_experts]` -> indices of the hosts that hold the expert, in the order of its replicas.

The first is the primary; none at all means that no live host holds the expert.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """One expert host, as others see it.

    Attributes:
        id: name of the host; never given to another host within a run.
        node: the machine it runs on (a Ray node id); hosts and routers of one node share memory.
        pid: its process.
        addresses: channel kind (`shm`, `grpc`) -> address that `channels.connect` takes.
    """

    id: str
    node: str = ""
    pid: int = 0
    addresses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """One version of the experts: which hosts hold which of which layer, and with which weights.

    Attributes:
        epoch: what the hosts hold; a host refuses requests of an epoch that it does not hold.
        hosts: the hosts; `holders` points into this tuple.
        holders: of every expert; rows are the MoE layers in the order of `ModelConfig.moe_layers`.
        weights: version of the weights; epochs with equal ones compute the same.
        serial: grows with every change that a router should know; within an epoch hosts only go.
    """

    epoch: int
    hosts: tuple[HostInfo, ...]
    holders: Holders
    weights: str = ""
    serial: int = 0

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON keeps without loss."""
        return {
            "epoch": self.epoch,
            "hosts": [
                {"id": h.id, "node": h.node, "pid": h.pid, "addresses": dict(h.addresses)} for h in self.hosts
            ],
            "holders": [[list(hosts) for hosts in row] for row in self.holders],
            "weights": self.weights,
            "serial": self.serial,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoutingTable:
        """The inverse of `to_json`."""
        return cls(
            epoch=int(value["epoch"]),
            hosts=tuple(HostInfo(**host) for host in value["hosts"]),
            holders=tuple(tuple(tuple(hosts) for hosts in row) for row in value["holders"]),
            weights=str(value["weights"]),
            serial=int(value["serial"]),
        )


def experts_held(holders: Holders, layers: Sequence[int], host: int) -> dict[int, tuple[int, ...]]:
    """The experts of the host at index `host`: model layer index -> expert ids, ascending (maybe none).

    Args:
        layers: model layer index of each row of `holders`.
    """
    return {
        layer: tuple(expert for expert, hosts in enumerate(row) if host in hosts)
        for layer, row in zip(layers, holders, strict=True)
    }


__all__ = ["Holders", "HostInfo", "RoutingTable", "experts_held"]
