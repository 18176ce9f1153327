"""Gradients of experts with several holders, summed over the holders before a step is committed.

The tokens of an expert are distributed over its holders, so each holder has the gradients of its share. When
a step has been sealed, the holders fetch each other's gradients and add them in the same order, so all of
them apply the same step. The primary holder counts the expert's gradient in the norm and writes the expert to
checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from actors.host.expert_layers import ExpertLayer
from actors.messages.tensor_stream import TensorFiller
from actors.messages.transfer_orders import Origin, Peer, Pull, grouped, pairs
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError, RemoteError, is_loss

Pair = tuple[int, int]
"""(layer, expert)."""


class GradientSums:
    """Gradient sums of one host and epoch; several threads may call them at the same time.

    Args:
        host: Id of this host.
        epoch: Epoch of the experts.
        shared: Other holders of this host's experts, each with the experts that it holds.
        connect: Opens a connection to a holder.
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
        self._gathered = -1  # step of the sums
        self._opening = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._closed = False

    def __bool__(self) -> bool:
        """Whether any expert has another holder."""
        return bool(self._holders)

    def speaks_for(self, layer: int, expert: int) -> bool:
        """Whether this host is the primary holder, which counts the expert and writes it to checkpoints."""
        holders = self._holders.get((layer, expert))
        return holders is None or holders[0] == self._host

    def gather(self, layers: Mapping[int, ExpertLayer], step: int) -> None:
        """Fetch the gradients of the other holders and add them up, after all holders have sealed the step.

        The host's own gradients are not changed, because the other holders fetch them. Holders are added one
        after the other, in the order of their ids, so memory holds the sums and the gradients of one holder.

        Raises:
            ChannelError: a holder is lost, or this host has been told to hold other experts.
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

    def squared_norm(self, layers: Mapping[int, ExpertLayer]) -> float:
        """Sum of the squared gradients of the experts whose primary holder is this host, in float64."""
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

    def apply(self, index: int, layer: ExpertLayer) -> None:
        """Replace the gradients of a layer by the sums."""
        for expert in layer.experts:
            total = self._sums.pop((index, expert), None)
            if total is not None:
                for mine, summed in zip(gradients(layer, expert), total, strict=True):
                    mine.copy_(summed)

    def close(self) -> None:
        """Close the connections to the other holders for good; fetches under way fail."""
        with self._opening:
            self._closed = True
            peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()

    def _part(
        self, id: str, layers: Mapping[int, ExpertLayer], step: int
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
        self, layers: Mapping[int, ExpertLayer], origin: Origin, step: int
    ) -> dict[Pair, tuple[Tensor, Tensor]]:
        wanted = list(pairs(origin.experts))
        made = {(layer, e): tuple(map(torch.empty_like, gradients(layers[layer], e))) for layer, e in wanted}
        pull = Pull(experts=grouped(wanted), base=self._epoch, step=step, gradients=True)
        id = origin.host.id
        try:
            TensorFiller([part for pair in wanted for part in made[pair]]).read(
                self._peer(origin).fetch(pull)
            )
        except (RaymoeError, ValueError) as error:  # ValueError: the connection was closed meanwhile
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


def gradients(layer: ExpertLayer, expert: int) -> tuple[Tensor, Tensor]:
    """Live views of the gradients of an expert's w13 and w2."""
    at = int(layer.local_of[expert])
    assert layer.optimizer is not None
    return layer.optimizer.gradients["w13"][at], layer.optimizer.gradients["w2"][at]


def _all(shared: Iterable[Origin]) -> list[Pair]:
    return list(dict.fromkeys(pair for origin in shared for pair in pairs(origin.experts)))


__all__ = ["GradientSums", "gradients"]
