"""Moves of expert state: assembles the experts of a new epoch, and serves state to other hosts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from actors.host.expert_layers import ExpertLayers, LayerMaker
from actors.host.expert_sources import ExpertSources, LocalState, read_experts
from actors.host.gradient_sums import GradientSums, gradients
from actors.host.host_settings import HostResources, HostSettings, InitialExperts
from actors.host.hosted_versions import HostedVersion, HostedVersions
from actors.host.snapshot_store import SnapshotStore
from actors.host.state_copy import check_experts
from actors.messages.tensor_stream import tensor_frames
from actors.messages.transfer_orders import Assembly, ExpertIds, Pull, pairs
from errors import ProtocolError
from model.config import ModelConfig


class StateTransfers:
    """Assembles versions and serves the state of experts; several threads may call it at the same time.

    Args:
        host: Id of the host.
        config: The model.
        settings: How the host computes.
        versions: The experts, by epoch; assembled versions are added.
        snapshots: Copies of earlier steps.
        resources: Checkpoints, memory and other hosts.

    Attributes:
        resources: Checkpoints, memory and other hosts, used by every assembly from now on.
    """

    def __init__(
        self,
        host: str,
        config: ModelConfig,
        settings: HostSettings,
        versions: HostedVersions,
        snapshots: SnapshotStore,
        resources: HostResources,
    ) -> None:
        self._host = host
        self._config = config
        self._settings = settings
        self._versions = versions
        self._snapshots = snapshots
        self.resources = resources
        self._assembling = threading.Lock()

    def assemble(self, order: Assembly) -> None:
        """Assemble the experts of a new epoch next to those in use, from the sources that `Assembly` names.

        A retry does nothing. Requests of earlier epochs are answered meanwhile, and those of the new epoch
        afterwards.

        Raises:
            ProtocolError: the epoch is held already, an expert has no source, or live state has another step.
            ResourceError: there is too little memory beside what is held.
            ChannelError: another host did not give the experts that the order names it for.
            RaymoeError: from the directory.
        """
        trains = self._settings.trains
        with self._assembling:
            if self._versions.has(order):
                return
            check_experts(self._config, order.experts)
            if trains and order.step is None:
                raise ProtocolError(
                    f"expert host {self._host} trains: say of which step epoch {order.epoch} is"
                )
            step = 0 if order.step is None else order.step
            base = None if order.base is None else self._versions.held.get(order.base)
            layers: ExpertLayers = {}
            if base is not None and not trains:  # weights do not change in serving: both epochs share them
                for index, ids in order.experts.items():
                    if ids and index in base.layers and base.layers[index].experts == tuple(ids):
                        layers[index] = base.layers[index]
            wanted = {index: ids for index, ids in order.experts.items() if index not in layers}
            self._check_room(wanted)
            made = empty_layers(self._config, self._settings, wanted, step)
            sources = ExpertSources(host=self._host, resources=self.resources, trains=trains)
            sources.fill(made, order, self._local_state(order, base))
            version = HostedVersion(order.epoch, layers | made, step, order)
            if trains:
                version.sums = GradientSums(self._host, order.epoch, order.shared, self.resources.connect)
            self._versions.add(version)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """The state of experts as frames of `actors.messages.tensor_stream`, all of one step.

        Raises:
            ProtocolError: the host does not have one of the experts, or not at this step, or no longer.
            RaymoeError: the last commit failed.
        """
        check_experts(self._config, pull.experts)
        base = None if pull.base is None else self._versions.held.get(pull.base)
        if pull.base is not None and base is None:
            raise ProtocolError(
                f"expert host {self._host} holds epochs {tuple(self._versions.held)}, not {pull.base}"
            )
        if pull.gradients:
            yield from self._gradient_frames(pull, base)
            return
        local_state = self._local_state(pull, base)
        for layer, expert in pairs(pull.experts):
            found = local_state(layer, expert)
            if found is None:
                where = f"epoch {pull.base}" if base is not None else f"what it keeps of step {pull.step}"
                raise ProtocolError(
                    f"expert host {self._host} has no expert {expert} of layer {layer} in {where}"
                )
            parts, intact = found
            yield from tensor_frames(parts if pull.moments else parts[:2], intact)

    def _gradient_frames(self, pull: Pull, version: HostedVersion | None) -> Iterator[bytes]:
        """Sealed gradients, for other holders of the same experts."""
        if version is None or pull.step is None or not self._settings.trains:
            raise ProtocolError(f"expert host {self._host}: gradients are of an epoch and a step of training")
        step = pull.step
        self._versions.check_sealed(version, step)
        wanted = list(pairs(pull.experts))
        for layer, expert in wanted:
            held = version.layers.get(layer)
            if held is None or not held.local_of[expert] >= 0:
                raise ProtocolError(f"expert host {self._host} has no expert {expert} of layer {layer}")
        parts = (part for layer, expert in wanted for part in gradients(version.layers[layer], expert))
        yield from tensor_frames(parts, lambda: self._versions.check_sealed(version, step))

    def _check_room(self, experts: ExpertIds) -> None:
        """Check that memory suffices for another version; for the first one this is checked at the start."""
        require_room = self.resources.require_room
        if require_room is None or not any(held.layers for held in self._versions.held.values()):
            return
        config = self._config
        size = 3 * config.hidden_size * config.moe_intermediate_size * self._settings.dtype.itemsize
        require_room(size * sum(map(len, experts.values())))

    def _local_state(self, order: Assembly | Pull, base: HostedVersion | None) -> LocalState:
        """Finds experts in the live state of `base`, which must be at the order's step, or in snapshots.

        Raises:
            ProtocolError: the live state is of another step.
            RaymoeError: its last commit failed.
        """
        if order.base is None:
            snapshots, at = self._snapshots, order.step
            return lambda layer, expert: None if at is None else snapshots.find(at, layer, expert)
        if base is None or not base.layers:  # a host that joined without experts is at no particular step
            return lambda layer, expert: None
        version, step, trains = base, order.step, self._settings.trains
        if trains:
            if step is None:
                raise ProtocolError(
                    f"expert host {self._host} trains: say which step of epoch {order.base} it is"
                )
            self._versions.await_commit(version, step, self._settings.commit_timeout)

        def intact() -> None:
            if trains and step is not None:
                self._versions.check(version, step)

        def find(layer: int, expert: int) -> tuple[tuple[Tensor, ...], Callable[[], None]] | None:
            held = version.layers.get(layer)
            if held is None or not held.local_of[expert] >= 0:
                return None
            return held.parts(expert, moments=trains), intact

        return find


def empty_layers(
    config: ModelConfig, settings: HostSettings, experts: Mapping[int, Sequence[int]], step: int
) -> ExpertLayers:
    """Layers for these experts, in the model's order, whose weights are still to be filled."""
    maker = LayerMaker(
        config=config,
        optimizer=settings.optimizer,
        dtype=settings.dtype,
        device=torch.device(settings.device),
    )
    return {index: maker.layer(experts[index], step) for index in sorted(experts) if experts[index]}


def initial_version(config: ModelConfig, settings: HostSettings, initial: InitialExperts) -> HostedVersion:
    """The version that a host starts with.

    Raises:
        CheckpointError: from the source of weights or moments.
    """
    layers = empty_layers(config, settings, initial.experts, initial.step)
    wanted = list(pairs({index: layer.experts for index, layer in layers.items()}))
    read_experts(layers, wanted, initial.source, initial.moments if settings.trains else None)
    return HostedVersion(initial.epoch, layers, initial.step)


__all__ = ["StateTransfers", "initial_version"]
