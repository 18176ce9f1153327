"""A routing table as lanes use it: tensors of the hosts that hold each expert.

Shapes: N tokens, K experts per token, E experts; R ways to choose one replica of every expert.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.replica_choices import replica_choices
from cluster.topology import RoutingTable
from errors import ProtocolError
from model.config import ModelConfig

Array = npt.NDArray[Any]


class HostMap:
    """The hosts of every expert, by layer.

    Attributes:
        epoch, weights: Placement epoch and name of the weights of the routing table.
        hosts: The hosts that indices of hosts refer to.
        lacking: Number of (layer, expert) pairs that no host holds.
    """

    def __init__(self, table: RoutingTable, config: ModelConfig) -> None:
        if len(table.holders) != len(config.moe_layers):
            raise ProtocolError(
                f"the routing table of epoch {table.epoch} has {len(table.holders)} layers, the model "
                f"{len(config.moe_layers)} with routed experts"
            )
        self.epoch = table.epoch
        self.weights = table.weights
        self.hosts = table.hosts
        self.lacking = sum(not hosts for row in table.holders for hosts in row)
        self._table, self._config = table, config
        # One array [L, R, E] for all layers, so that each layer's is a view.
        ways = np.array(replica_choices(table.holders, len(table.hosts)), np.int64).swapaxes(0, 1).copy()
        self._arrays: dict[int, Array] = dict(zip(config.moe_layers, ways, strict=True))
        self._host_of = {layer: torch.from_numpy(array) for layer, array in self._arrays.items()}
        self._replicated = {
            layer: all(len(hosts) > 1 for hosts in row)
            for layer, row in zip(config.moe_layers, table.holders, strict=True)
        }
        self._trained = -1

    def host_of(self, layer: int) -> Tensor:
        """[R, E] int64: index into `hosts` for each expert of a layer; -1 where no host holds it.

        Raises:
            ProtocolError: The layer has no routed experts.
        """
        try:
            return self._host_of[layer]
        except KeyError:
            raise ProtocolError(
                f"layer {layer} has no routed experts; these have: {sorted(self._host_of)}"
            ) from None

    def array(self, layer: int) -> Array:
        """`host_of` as an array that shares its memory."""
        self.host_of(layer)
        return self._arrays[layer]

    def covers(self, layer: int, idx: Tensor | Array) -> bool:
        """Whether there is a host for every expert of idx [N, K]."""
        if not self.lacking:
            return True
        chosen = idx.cpu().numpy() if isinstance(idx, Tensor) else idx
        return bool((self.array(layer)[0, chosen] >= 0).all())

    def replicated(self, layer: int) -> bool:
        """Whether every expert of a layer has a second replica."""
        return self._replicated[layer]

    def has(self, host_id: str) -> bool:
        """Whether a host is in the table."""
        return any(host.id == host_id for host in self.hosts)

    def without(self, lost: Collection[str]) -> HostMap:
        """The map without the hosts of these ids; the same object if none of them is in the table."""
        left = [at for at, host in enumerate(self.hosts) if host.id not in lost]
        if len(left) == len(self.hosts):
            return self
        place = {old: new for new, old in enumerate(left)}
        table = RoutingTable(
            epoch=self._table.epoch,
            hosts=tuple(self.hosts[at] for at in left),
            holders=tuple(
                tuple(tuple(place[host] for host in hosts if host in place) for hosts in row)
                for row in self._table.holders
            ),
            weights=self._table.weights,
            serial=self._table.serial,
        )
        return HostMap(table, self._config)

    def trained(self, step: int) -> None:
        """Record that hosts have taken a FORWARD of this step under this map."""
        self._trained = max(self._trained, step)

    def has_trained(self, step: int) -> bool:
        """Whether a step has begun under this map: then it has to end under it."""
        return self._trained == step


__all__ = ["HostMap"]
