"""The sources that the layers of a new epoch are filled from: own state, other hosts, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from actors.host.checkpoint_part import MomentSource
from actors.host.expert_layers import ExpertLayers, Parts
from actors.host.host_settings import HostResources
from actors.messages.tensor_stream import TensorFiller
from actors.messages.transfer_orders import Assembly, Origin, Pull, grouped, pairs
from errors import ChannelError, CheckpointError, ProtocolError, RaymoeError, RemoteError
from model.weight_source import WeightSource

LocalState = Callable[[int, int], tuple[Parts, Callable[[], None]] | None]
"""(layer, expert) -> its parts on this host, and a check that raises if they changed while they were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSources:
    """The sources of a host's experts.

    Attributes:
        host: Id of the host, for error messages.
        resources: Checkpoints and other hosts.
        trains: Whether an expert's state includes the optimizer's moments.
    """

    host: str
    resources: HostResources
    trains: bool

    def fill(self, layers: ExpertLayers, order: Assembly, local_state: LocalState) -> None:
        """Fill layers that are not in use yet.

        Raises:
            ProtocolError: an expert has no source, or the host's own state is of another step.
            ChannelError: another host does not give the experts that the order names it for.
            RaymoeError: from the directory.
        """
        missing = []
        for layer, expert in pairs({layer: made.experts for layer, made in layers.items()}):
            found = local_state(layer, expert)
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
        self, layers: ExpertLayers, order: Assembly, origin: Origin, wanted: Sequence[tuple[int, int]]
    ) -> None:
        parts = [layers[layer].parts(expert, moments=self.trains) for layer, expert in wanted]
        filler = TensorFiller([part for one in parts for part in one])
        pull = Pull(experts=grouped(wanted), base=order.base, step=order.step, moments=self.trains)
        peer = None
        try:
            peer = self.resources.connect(origin.host)
            filler.read(peer.fetch(pull))
        except RaymoeError as error:
            layer, expert = wanted[min(filler.at // len(parts[0]), len(wanted) - 1)]
            answered = isinstance(error, RemoteError) or not isinstance(error, ChannelError)
            raise (RemoteError if answered else ChannelError)(
                f"expert host {self.host} could not pull expert {expert} of layer {layer} from expert host "
                f"{origin.host.id}: {error}"
            ) from error
        finally:
            if peer is not None:
                peer.close()

    def _read(self, layers: ExpertLayers, order: Assembly, missing: Sequence[tuple[int, int]]) -> None:
        if order.directory is None:
            layer, expert = missing[0]
            raise ProtocolError(
                f"expert host {self.host} finds expert {expert} of layer {layer} nowhere (and so "
                f"{len(missing)} in all): not here, at no origin of the order, and it names no directory"
            )
        if self.resources.open_source is None:
            raise ProtocolError(
                f"expert host {self.host} takes no other weights; it was asked to load {order.directory}"
            )
        source, moments = self.resources.open_source(order.directory), None
        if self.trains and order.moments:
            if self.resources.open_moments is None:
                raise ProtocolError(f"expert host {self.host} cannot read moments of {order.directory}")
            moments = self.resources.open_moments(order.directory)
        read_experts(layers, missing, source, moments)

    def _copy(self, layers: ExpertLayers, layer: int, expert: int, parts: Parts) -> None:
        for mine, other in zip(layers[layer].parts(expert, moments=self.trains), parts, strict=True):
            mine.copy_(other)


@torch.no_grad()
def read_experts(
    layers: ExpertLayers,
    wanted: Sequence[tuple[int, int]],
    source: WeightSource,
    moments: MomentSource | None,
) -> None:
    """Read experts from a source of weights, and their moments where there is one.

    Raises:
        CheckpointError: an expert is missing, damaged or of another shape.
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


__all__ = ["ExpertSources", "LocalState", "read_experts"]
