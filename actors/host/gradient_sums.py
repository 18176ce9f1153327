"""Gradients of experts that several hosts hold, summed over these hosts before a step is committed.

Tokens take turns among the replicas of an expert, so each holder has the gradients of its own share. When
a step is sealed, holders fetch one another's and add them up in the same order: all of them apply the same
step, and one of them speaks for the expert where something is counted or written once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from actors.host.expert_layers import Layer
from actors.messages.tensor_stream import Inflow
from actors.messages.transfer_orders import Origin, Peer, Pull, grouped, pairs
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError, RemoteError, is_loss

Pair = tuple[int, int]
"""(layer, expert)."""


class Summing:
    """Of one host and epoch. Any thread may call.

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
        self._gathering = threading.Lock()
        self._sums: dict[Pair, tuple[Tensor, Tensor]] = {}
        self._gathered = -1  # the step of the sums
        self._opening = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._closed = False

    def __bool__(self) -> bool:
        """Whether there is anything to sum."""
        return bool(self._holders)

    def speaks_for(self, layer: int, expert: int) -> bool:
        """Whether it is this host that an expert is counted and written by."""
        holders = self._holders.get((layer, expert))
        return holders is None or holders[0] == self._host

    def gather(self, layers: Mapping[int, Layer], step: int) -> None:
        """Fetch the other holders' gradients of a step and add them up; all have sealed it, this host too.

        Own gradients stay as they are, for the others to fetch. Holders come one after the other, in the
        order of their ids: there is no more in memory than the sums and what one of them sends.

        Raises:
            ChannelError: a holder is lost, or this host is to hold something else by now.
            RaymoeError: a holder is at another step or epoch.
        """
        with self._gathering:
            self._gathered, sums = -1, dict[Pair, tuple[Tensor, Tensor]]()
            for id in sorted([self._host, *self._shared]):
                mine = id == self._host
                for pair, part in self._part(id, layers, step):
                    if pair not in sums:
                        sums[pair] = (part[0].clone(), part[1].clone()) if mine else part
                    else:
                        for total, one in zip(sums[pair], part, strict=True):
                            total += one
            self._sums, self._gathered = sums, step

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

    def has(self, step: int) -> bool:
        """Whether the sums of a step are complete."""
        return self._gathered == step

    def apply(self, index: int, layer: Layer) -> None:
        """Put the sums in the place of own gradients of a layer."""
        for expert in layer.experts:
            total = self._sums.pop((index, expert), None)
            if total is not None:
                for mine, summed in zip(gradients(layer, expert), total, strict=True):
                    mine.copy_(summed)

    def close(self) -> None:
        """Hang up on the other holders, which ends whatever is being fetched, for good."""
        with self._opening:
            self._closed = True
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()

    def _part(
        self, id: str, layers: Mapping[int, Layer], step: int
    ) -> Iterable[tuple[Pair, tuple[Tensor, Tensor]]]:
        if id == self._host:
            return [((layer, e), gradients(layers[layer], e)) for layer, e in self._holders]
        return self._fetch(layers, self._shared[id], step).items()

    def _peer(self, origin: Origin) -> Peer:
        with self._opening:
            if self._closed:
                raise ChannelError("it holds other experts by now")
            if origin.host.id not in self._peers:
                self._peers[origin.host.id] = self._connect(origin.host)
            return self._peers[origin.host.id]

    def _fetch(
        self, layers: Mapping[int, Layer], origin: Origin, step: int
    ) -> dict[Pair, tuple[Tensor, Tensor]]:
        wanted = list(pairs(origin.experts))
        made = {(layer, e): tuple(map(torch.empty_like, gradients(layers[layer], e))) for layer, e in wanted}
        pull = Pull(experts=grouped(wanted), base=self._epoch, step=step, gradients=True)
        id = origin.host.id
        try:
            Inflow([part for pair in wanted for part in made[pair]]).read(self._peer(origin).fetch(pull))
        except (RaymoeError, ValueError) as error:  # a ValueError: it has been closed meanwhile
            with self._opening:
                peer = self._peers.pop(id, None)
            if peer is not None:
                peer.close()
            lost = is_loss(error) if isinstance(error, RaymoeError) else self._closed
            raise (ChannelError if lost or self._closed else RemoteError)(
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
