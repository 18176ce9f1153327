"""Expert hosts and routing tables: the values that a coordinator sends to routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Holders = tuple[tuple[tuple[int, ...], ...], ...]
"""`[L][E]` -> indices of the hosts that hold the expert, in the order of its replicas.

The first is the primary; empty if no live host holds the expert.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """Where an expert host runs, and how it is reached.

    Attributes:
        id: Name of the host; never reused within a run.
        node: Machine that it runs on (a Ray node id); hosts and routers of one node share memory.
        pid: Process id.
        addresses: Channel kind (such as `shm`, `cuda`, `nccl`, `collective`, `grpc`) -> address for
            `channels.choose.connect`.
    """

    id: str
    node: str = ""
    pid: int = 0
    addresses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """Which hosts hold which experts of a version of the weights.

    Attributes:
        epoch: Placement epoch; a host refuses requests of an epoch that it does not hold.
        hosts: The hosts; `holders` points into this tuple.
        holders: Holders of every expert; rows are the MoE layers in the order of `ModelConfig.moe_layers`.
        weights: Version of the weights; epochs of the same version compute the same.
        serial: Grows with every change that a router should know; within an epoch only hosts are removed.
    """

    epoch: int
    hosts: tuple[HostInfo, ...]
    holders: Holders
    weights: str = ""
    serial: int = 0

    def to_json(self) -> dict[str, Any]:
        """This table as a dictionary that JSON preserves exactly."""
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
    """The experts of one host: model layer index -> expert ids, ascending, possibly none.

    Args:
        holders: `[L][E]` holders of every expert.
        layers: Model layer index of each row of `holders`.
        host: Index of the host.
    """
    return {
        layer: tuple(expert for expert, hosts in enumerate(row) if host in hosts)
        for layer, row in zip(layers, holders, strict=True)
    }


__all__ = ["Holders", "HostInfo", "RoutingTable", "experts_held"]
