"""Who holds which experts: the values that a coordinator hands to its routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


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
    """One version of the experts: which host owns which of which layer, and with which weights.

    Attributes:
        epoch: version of the table; a host refuses requests of an epoch that it does not hold.
        hosts: the hosts; `owner` points into this tuple.
        owner: `[n_moe_layers][n_routed_experts]` -> index into `hosts`; rows are the MoE layers in the
            order of `ModelConfig.moe_layers`.
        weights: version of the weights; epochs with equal ones compute the same.
    """

    epoch: int
    hosts: tuple[HostInfo, ...]
    owner: tuple[tuple[int, ...], ...]
    weights: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON keeps without loss."""
        return {
            "epoch": self.epoch,
            "hosts": [
                {"id": h.id, "node": h.node, "pid": h.pid, "addresses": dict(h.addresses)} for h in self.hosts
            ],
            "owner": [list(row) for row in self.owner],
            "weights": self.weights,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoutingTable:
        """The inverse of `to_json`."""
        return cls(
            epoch=int(value["epoch"]),
            hosts=tuple(HostInfo(**host) for host in value["hosts"]),
            owner=tuple(tuple(row) for row in value["owner"]),
            weights=str(value.get("weights", "")),
        )


def experts_owned(
    owner: tuple[tuple[int, ...], ...], layers: Sequence[int], host: int
) -> dict[int, tuple[int, ...]]:
    """The experts of the host at index `host`: model layer index -> expert ids, ascending (maybe none).

    Args:
        owner: see `RoutingTable.owner`.
        layers: model layer index of each row of `owner`.
        host: index of the host.
    """
    return {
        layer: tuple(expert for expert, at in enumerate(row) if at == host)
        for layer, row in zip(layers, owner, strict=True)
    }


__all__ = ["HostInfo", "RoutingTable", "experts_owned"]
