"""Fills the layers of a new epoch: from what the host has itself, from peers, from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from actors.host.checkpoint_part import MomentSource
from actors.host.expert_layers import Layers, Parts
from actors.messages.tensor_stream import Inflow
from actors.messages.transfer_orders import Assembly, Origin, Peer, Pull, grouped, pairs
from cluster.topology import HostInfo
from errors import ChannelError, CheckpointError, ProtocolError, RaymoeError, RemoteError
from model.weight_source import WeightSource

Own = Callable[[int, int], tuple[Parts, Callable[[], None]] | None]
"""(layer, expert) -> its parts on this host, and what raises when they changed while they were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where a host's experts can come from.

    Attributes:
        host: its name, for errors.
        connect: reaches a peer.
        open_source: opens a directory's weights; None refuses directories.
        open_moments: opens a directory's moments.
        trains: whether moments belong to an expert.
    """

    host: str
    connect: Callable[[HostInfo], Peer]
    open_source: Callable[[str], WeightSource] | None
    open_moments: Callable[[str], MomentSource] | None
    trains: bool

    def fill(self, layers: Layers, order: Assembly, own: Own) -> None:
        """Fill layers that are not in use yet.

        Raises:
            ProtocolError: an expert is nowhere, or state of the host's own is of another step.
            ChannelError: a peer does not give what it was named for.
            RaymoeError: from the directory.
        """
        missing = []
        for layer, expert in pairs({layer: made.experts for layer, made in layers.items()}):
            found = own(layer, expert)
            if found is None:
                missing.append((layer, expert))
                continue
            parts, intact = found
            self._copy(layers, layer, expert, parts)
            intact()
        for origin in order.origins:
            there = set(pairs(origin.experts))
            wanted = [pair for pair in missing if pair in there]
            if wanted:
                self._pull(layers, order, origin, wanted)
                missing = [pair for pair in missing if pair not in there]
        if missing:
            self._read(layers, order, missing)
        for made in layers.values():
            made.filled()

    def _pull(
        self, layers: Layers, order: Assembly, origin: Origin, wanted: Sequence[tuple[int, int]]
    ) -> None:
        parts = [layers[layer].parts(expert, moments=self.trains) for layer, expert in wanted]
        inflow = Inflow([part for one in parts for part in one])
        pull = Pull(experts=grouped(wanted), base=order.base, step=order.step, moments=self.trains)
        peer = None
        try:
            peer = self.connect(origin.host)
            inflow.read(peer.fetch(pull))
        except RaymoeError as error:
            layer, expert = wanted[min(inflow.at // len(parts[0]), len(wanted) - 1)]
            answered = isinstance(error, RemoteError) or not isinstance(error, ChannelError)
            raise (RemoteError if answered else ChannelError)(
                f"expert host {self.host} could not pull expert {expert} of layer {layer} from expert host "
                f"{origin.host.id}: {error}"
            ) from error
        finally:
            if peer is not None:
                peer.close()

    def _read(self, layers: Layers, order: Assembly, missing: Sequence[tuple[int, int]]) -> None:
        if order.directory is None:
            layer, expert = missing[0]
            raise ProtocolError(
                f"expert host {self.host} finds expert {expert} of layer {layer} nowhere (and so "
                f"{len(missing)} in all): not here, at no origin of the order, and it names no directory"
            )
        if self.open_source is None:
            raise ProtocolError(
                f"expert host {self.host} takes no other weights; it was asked to load {order.directory}"
            )
        source, moments = self.open_source(order.directory), None
        if self.trains and order.moments:
            if self.open_moments is None:
                raise ProtocolError(f"expert host {self.host} cannot read moments of {order.directory}")
            moments = self.open_moments(order.directory)
        read_experts(layers, missing, source, moments)

    def _copy(self, layers: Layers, layer: int, expert: int, parts: Parts) -> None:
        for mine, other in zip(layers[layer].parts(expert, moments=self.trains), parts, strict=True):
            mine.copy_(other)


@torch.no_grad()
def read_experts(
    layers: Layers,
    wanted: Sequence[tuple[int, int]],
    source: WeightSource,
    moments: MomentSource | None,
) -> None:
    """Read experts of files, or draw them.

    Raises:
        CheckpointError: they are missing, damaged or of another shape.
    """
    for layer, expert in wanted:
        parts: Parts = source.expert(layer, expert)
        if moments is not None:
            of_w13, of_w2 = moments.moments(layer, expert)
            parts = (*parts, *of_w13, *of_w2)
        mine = layers[layer].parts(expert, moments=moments is not None)
        for one, other in zip(mine, parts, strict=True):
            if one.shape != other.shape:
                raise CheckpointError(
                    f"expert {expert} of layer {layer} has {list(other.shape)} where the model has "
                    f"{list(one.shape)}"
                )
            one.copy_(other)
    for made in layers.values():
        made.filled()


__all__ = ["Own", "Sources", "read_experts"]
