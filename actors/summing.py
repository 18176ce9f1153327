"""Gradients of experts that several hosts hold, summed over these hosts before a step is committed.

Tokens take turns among the replicas of an expert, so each holder has the gradients of its own share. When
a step is sealed, holders fetch one another's and add them up in the same order: all of them apply the same
step, and one of them speaks for the expert where something is counted or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from actors.layers import Layer
from actors.moves import Origin, Peer, Pull, grouped, pairs
from actors.state_stream import Inflow
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError, RemoteError

Pair = tuple[int, int]
"""(layer, expert)."""


class Summing:
    """Of one host and epoch; one thread at a time.

    Args:
        host: id of this host.
        epoch: of the experts.
        shared: other holders of experts of this host, each with those that it holds too.
        connect: reaches a holder.
    """

    def __init__(
        self, host: str, epoch: int, shared: Sequence[Origin], connect: Callable[[HostInfo], Peer]
    ) -> None:
        self._host, self._epoch, self._connect = host, epoch, connect
        self._shared = {origin.host.id: origin for origin in shared}
        holders: dict[Pair, list[str]] = {}
        for id in sorted([host, *self._shared]):
            for pair in pairs(self._shared[id].experts) if id != host else _all(shared):
                holders.setdefault(pair, []).append(id)
        self._holders = holders
        self._sums: dict[Pair, tuple[Tensor, Tensor]] = {}
        self._peers: dict[str, Peer] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to sum."""
        return bool(self._holders)

    def speaks_for(self, layer: int, expert: int) -> bool:
        """Whether it is this host that an expert is counted and written by."""
        holders = self._holders.get((layer, expert))
        return holders is None or holders[0] == self._host

    def gather(self, layers: Mapping[int, Layer], step: int) -> None:
        """Fetch the other holders' gradients of a sealed step and add them up; own ones stay as they are.

        Raises:
            ChannelError: a holder is lost.
            RaymoeError: it is at another step or epoch.
        """
        self._sums.clear()
        found = {id: self._fetch(layers, origin, step) for id, origin in self._shared.items()}
        found[self._host] = {
            (layer, expert): gradients(layers[layer], expert) for layer, expert in self._holders
        }
        for pair, holders in self._holders.items():
            first, *others = (found[id][pair] for id in holders)
            total = (first[0].clone(), first[1].clone())
            for other in others:
                for mine, theirs in zip(total, other, strict=True):
                    mine += theirs
            self._sums[pair] = total

    def squared_norm(self, layers: Mapping[int, Layer]) -> float:
        """Sum of the squared gradients of all experts that this host speaks for, in float64."""
        total = 0.0
        for index, layer in layers.items():
            for expert in layer.experts:
                if self.speaks_for(index, expert):
                    for one in self._sums.get((index, expert)) or gradients(layer, expert):
                        flat = one.reshape(-1).double()
                        total += float(torch.dot(flat, flat))
        return total

    def apply(self, index: int, layer: Layer) -> None:
        """Put the sums in the place of own gradients of a layer."""
        for expert in layer.experts:
            total = self._sums.pop((index, expert), None)
            if total is not None:
                for mine, summed in zip(gradients(layer, expert), total, strict=True):
                    mine.copy_(summed)

    def close(self) -> None:
        """Hang up on the other holders."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()

    def _fetch(
        self, layers: Mapping[int, Layer], origin: Origin, step: int
    ) -> dict[Pair, tuple[Tensor, Tensor]]:
        wanted = list(pairs(origin.experts))
        made = {(layer, e): tuple(map(torch.empty_like, gradients(layers[layer], e))) for layer, e in wanted}
        pull = Pull(experts=grouped(wanted), base=self._epoch, step=step, gradients=True)
        id = origin.host.id
        try:
            if id not in self._peers:
                self._peers[id] = self._connect(origin.host)
            Inflow([part for pair in wanted for part in made[pair]]).read(self._peers[id].fetch(pull))
        except RaymoeError as error:
            peer = self._peers.pop(id, None)
            if peer is not None:
                peer.close()
            answered = isinstance(error, RemoteError) or not isinstance(error, ChannelError)
            raise (RemoteError if answered else ChannelError)(
                f"expert host {self._host} could not get gradients of step {step} from expert host {id}: "
                f"{error}"
            ) from error
        return {pair: (first, second) for pair, (first, second) in made.items()}


def gradients(layer: Layer, expert: int) -> tuple[Tensor, Tensor]:
    """Live views of an expert's gradients, of w13 and of w2."""
    at = int(layer.local_of[expert])
    assert layer.optimizer is not None
    return layer.optimizer.gradients["w13"][at], layer.optimizer.gradients["w2"][at]


def _all(shared: Iterable[Origin]) -> list[Pair]:
    return list(dict.fromkeys(pair for origin in shared for pair in pairs(origin.experts)))


__all__ = ["Summing", "gradients"]
