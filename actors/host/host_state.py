"""The state of an expert host: its experts by epoch, how they move, and what is kept for recovery."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.host.checkpoint_part import MomentSource, Pair, save_experts
from actors.host.epoch_assembly import Own, Sources, read_experts
from actors.host.expert_layers import LayerMaker, Layers
from actors.host.expert_versions import Version, Versions
from actors.host.gradient_sums import Summing, gradients
from actors.host.snapshot_push import Pusher
from actors.host.snapshot_store import Memory
from actors.host.state_copies import check_experts
from actors.host.usage_meter import Meter
from actors.messages.steps import OptimizerSettings
from actors.messages.tensor_stream import frames
from actors.messages.timeline import Timeline
from actors.messages.transfer_orders import Assembly, Blob, ExpertIds, Peer, Pull, Stored, pairs
from actors.rpc.host_client import HostClient
from cluster.topology import HostInfo
from errors import ProtocolError
from model.config import ModelConfig
from model.weight_source import WeightSource


class HostState:
    """What an expert host holds; `ExpertHost` answers requests with it.

    All methods may be called from several threads at once.

    Args:
        host_id: name of the host.
        config: the model.
        experts: model layer index -> ids of the experts that this host begins with; maybe none.
        source: where the weights come from.
        open_source: opens a directory with other weights for `assemble`; None refuses that.
        open_moments: opens a directory's moments, likewise.
        require_room: is told how many bytes an assembly needs beside what is held; refuses by raising.
        optimizer: settings of AdamW; None for a host that only infers.
        moments: where the optimizer's moments come from; None starts with zeros.
        dtype: of rows and replies, and of the weights that are computed with.
        threads: sets torch's threads, of the whole process; None leaves them alone.
        epoch: placement epoch.
        step: steps that the weights have behind them.
        device: where weights live.
        commit_timeout: seconds that whoever needs the next step waits for the commit.
        connect: reaches other hosts.
        timeline: records when the host is at work.

    Raises:
        CheckpointError: from the source.
    """

    def __init__(
        self,
        host_id: str,
        config: ModelConfig,
        experts: Mapping[int, Sequence[int]],
        source: WeightSource,
        *,
        open_source: Callable[[str], WeightSource] | None = None,
        open_moments: Callable[[str], MomentSource] | None = None,
        require_room: Callable[[int], None] | None = None,
        optimizer: OptimizerSettings | None = None,
        moments: MomentSource | None = None,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        epoch: int = 0,
        step: int = 0,
        device: torch.device | str = "cpu",
        commit_timeout: float = 120.0,
        connect: Callable[[HostInfo], Peer] = HostClient,
        timeline: Timeline | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.id = host_id
        self.config = config
        self.dtype = dtype
        self._open_source = open_source
        self._open_moments = open_moments
        self._require_room = require_room
        self._connect = connect
        self._timeline = timeline
        self._trains = optimizer is not None
        self._device = torch.device(device)
        self._commit_timeout = commit_timeout
        self._committing = threading.Lock()
        self._assembling = threading.Lock()
        self._snapping = threading.Lock()
        self._meter = Meter(config)
        compiled = self._device.type == "cpu" and dtype in (torch.float32, torch.float64)
        self._numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype if compiled else None
        self._memory = Memory(host_id, config, dtype)
        self._pusher = Pusher(connect)
        self._maker = LayerMaker(config=config, optimizer=optimizer, dtype=dtype, device=self._device)
        layers = self._empty_layers(experts, step)
        read_experts(layers, list(pairs(_ids(layers))), source, moments if self._trains else None)
        self._versions = Versions(host_id, Version(epoch, layers, step))

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._device

    @property
    def step(self) -> int:
        """Steps committed: the step that the weights are for."""
        return self._versions.current.step

    @property
    def epoch(self) -> int:
        """Of the weights that the host began with or was last told to retain."""
        return self._versions.current.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        """The same weights under another placement."""
        self._versions.rename(epoch)

    @property
    def epochs(self) -> tuple[int, ...]:
        """All that requests are answered of."""
        return tuple(self._versions.held)

    def assemble(self, order: Assembly) -> None:
        """Put the experts of a new epoch together beside those in use; see `Assembly` for where from.

        A repeat does nothing. Requests are answered meanwhile, and those of the new epoch afterwards.

        Raises:
            ProtocolError: the epoch is held already, an expert is nowhere, or own state is of another step.
            ResourceError: there is no room for it beside what is held.
            ChannelError: another host did not give what the order named it for.
            RaymoeError: from the directory.
        """
        with self._assembling:
            if self._versions.has(order):
                return
            check_experts(self.config, order.experts)
            if self._trains and order.step is None:
                raise ProtocolError(f"expert host {self.id} trains: say of which step epoch {order.epoch} is")
            step = 0 if order.step is None else order.step
            base = None if order.base is None else self._versions.held.get(order.base)
            layers: Layers = {}
            if base is not None and not self._trains:  # nothing changes in them: both epochs have them
                for index, ids in order.experts.items():
                    if ids and index in base.layers and base.layers[index].experts == tuple(ids):
                        layers[index] = base.layers[index]
            wanted = {index: ids for index, ids in order.experts.items() if index not in layers}
            self._check_room(wanted)
            made = self._empty_layers(wanted, step)
            sources = Sources(
                host=self.id,
                connect=self._connect,
                open_source=self._open_source,
                open_moments=self._open_moments,
                trains=self._trains,
            )
            sources.fill(made, order, self._own(order, base))
            version = Version(order.epoch, layers | made, step, order)
            if self._trains:
                version.summing = Summing(self.id, order.epoch, order.shared, self._connect)
            self._versions.add(version)

    def retain(self, *epochs: int) -> None:
        """Drop the experts of all epochs but these. Requests under way end with those that they began with.

        In training the host goes on from the last one's step, and forgets what it remembers of later ones.

        Raises:
            ProtocolError: the host does not hold one of them.
        """
        if set(epochs) <= set(self._versions.held):
            self._versions.leave(epochs)
        with self._committing:  # no copy of another version is made any more when this returns
            before = self._versions.current
            self._versions.retain(*epochs)
            if self._trains and self._versions.current is not before:
                self._memory.rewind(self.step)

    def fetch(self, pull: Pull) -> Iterator[bytes]:
        """The state of experts as frames (see `actors.messages.tensor_stream`), all of one step.

        Raises:
            ProtocolError: the host does not have one of them, or not at this step, or no longer.
            RaymoeError: the last commit failed.
        """
        check_experts(self.config, pull.experts)
        base = None if pull.base is None else self._versions.held.get(pull.base)
        if pull.base is not None and base is None:
            raise ProtocolError(f"expert host {self.id} holds epochs {self.epochs}, not {pull.base}")
        if pull.gradients:
            yield from self._gradients(pull, base)
            return
        own = self._own(pull, base)
        for layer, expert in pairs(pull.experts):
            found = own(layer, expert)
            if found is None:
                where = f"epoch {pull.base}" if base is not None else f"what it keeps of step {pull.step}"
                raise ProtocolError(
                    f"expert host {self.id} has no expert {expert} of layer {layer} in {where}"
                )
            parts, intact = found
            yield from frames(parts if pull.moments else parts[:2], intact)

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        """Copy the state aside, and then send it to buddies, in the background. A repeat does nothing.

        Waits for the step's commit if it is under way. Requests are answered meanwhile; the next commit
        waits until memory has been copied.

        Raises:
            ProtocolError: the host does not train, or is at another step or epoch.
        """
        if not self._trains:
            raise ProtocolError(f"expert host {self.id} does not train: it has no step to copy")
        version = self._versions.at(epoch)
        self._versions.settle(version, step, self._commit_timeout)
        with self._snapping:
            if self._memory.own(step, version.epoch) is not None:
                return
            with self._committing:
                if version is not self._versions.current:
                    raise ProtocolError(f"expert host {self.id} has gone on to epoch {self.epoch}; ask again")
                self._versions.check(version, step)
                copy = self._memory.take(step, version.epoch, version.layers)
        self._pusher.push(copy, buddies)

    def store(self, frames: Iterator[bytes]) -> None:
        """Keep what another host or a worker sends; see `actors.host.snapshot_store`."""
        self._memory.store(frames)

    def put(self, blob: Blob) -> None:
        """Keep named tensors for a step, of each name the newest two."""
        self._memory.put(blob)

    def get(self, name: str, step: int) -> Blob:
        """What was put.

        Raises:
            ProtocolError: it is not kept.
        """
        return self._memory.get(name, step)

    def read(self, name: str, step: int) -> Iterator[bytes]:
        """What was put, as frames.

        Raises:
            ProtocolError: it is not kept.
        """
        return self._memory.read(name, step)

    def inventory(self) -> list[Stored]:
        """What is kept in memory: own snapshots, those of other hosts, blobs."""
        return self._memory.inventory()

    def ping(self, timeout: float) -> None:
        """Answers."""

    def close(self) -> None:
        """Hang up on other hosts."""
        self._versions.close()

    def gradients(self) -> list[Tensor]:
        """The gradient buffers, flat, for workers that hold the experts themselves and all-reduce them."""
        return [
            buffer
            for layer in self._versions.current.layers.values()
            if layer.optimizer is not None
            for buffer in layer.optimizer.gradient_buffers()
        ]

    def weights(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Every expert of this host: layer, id, w13 [2I, D] and w2 [D, I] as live views."""
        for index, layer in self._versions.current.layers.items():
            for expert in layer.experts:
                w13, w2 = layer.parts(expert, moments=False)
                yield index, expert, w13, w2

    def moments(self) -> Iterator[tuple[int, int, Pair, Pair]]:
        """Every expert's layer, id and (exp_avg, exp_avg_sq) of w13 and w2, live views; none in serving."""
        for index, layer in self._versions.current.layers.items():
            if layer.optimizer is not None:
                one, two = (layer.optimizer.moments()[name] for name in ("w13", "w2"))
                for at, expert in enumerate(layer.experts):
                    yield index, expert, (one[0][at], one[1][at]), (two[0][at], two[1][at])

    def save(self, directory: str, epoch: int | None = None) -> list[str]:
        """Write own weights and moments into a checkpoint; the names of the files (see `expert_state`).

        Of an expert with several holders one writes.

        Raises:
            ProtocolError: the host is at another epoch.
            CheckpointError: the directory cannot be written to.
        """
        with self._committing:
            self._versions.at(epoch)
            mine = self._speaks_for
            weights = (one for one in self.weights() if mine(one[0], one[1]))
            moments = (one for one in self.moments() if mine(one[0], one[1]))
            return save_experts(Path(directory), self.id, weights, moments)

    def _speaks_for(self, layer: int, expert: int) -> bool:
        shares = self._versions.current.shares
        return shares is None or shares.speaks_for(layer, expert)

    def _gradients(self, pull: Pull, version: Version | None) -> Iterator[bytes]:
        """For other holders of the same experts."""
        if version is None or pull.step is None or not self._trains:
            raise ProtocolError(f"expert host {self.id}: gradients are of an epoch and a step of training")
        step = pull.step
        self._versions.check_sealed(version, step)
        wanted = list(pairs(pull.experts))
        for layer, expert in wanted:
            held = version.layers.get(layer)
            if held is None or not held.local_of[expert] >= 0:
                raise ProtocolError(f"expert host {self.id} has no expert {expert} of layer {layer}")
        parts = (part for layer, expert in wanted for part in gradients(version.layers[layer], expert))
        yield from frames(parts, lambda: self._versions.check_sealed(version, step))

    def _check_room(self, experts: ExpertIds) -> None:
        """Room for what a host begins with has been seen to before it was started."""
        if self._require_room is None or not any(held.layers for held in self._versions.held.values()):
            return
        config = self.config
        size = 3 * config.hidden_size * config.moe_intermediate_size * self.dtype.itemsize
        self._require_room(size * sum(map(len, experts.values())))

    def _empty_layers(self, experts: Mapping[int, Sequence[int]], step: int) -> Layers:
        return {index: self._maker.layer(experts[index], step) for index in sorted(experts) if experts[index]}

    def _own(self, order: Assembly | Pull, base: Version | None) -> Own:
        """Looks for experts in live state, or in memory; live state has to be of the order's step.

        Raises:
            ProtocolError: it is of another.
            RaymoeError: its last commit failed.
        """
        if order.base is None:
            memory, at = self._memory, order.step
            return lambda layer, expert: None if at is None else memory.find(at, layer, expert)
        if base is None or not base.layers:  # a host that joined empty is at no step that matters
            return lambda layer, expert: None
        version, step = base, order.step
        if self._trains:
            if step is None:
                raise ProtocolError(
                    f"expert host {self.id} trains: say which step of epoch {order.base} it is"
                )
            self._versions.settle(version, step, self._commit_timeout)

        def intact() -> None:
            if self._trains and step is not None:
                self._versions.check(version, step)

        def find(layer: int, expert: int) -> tuple[tuple[Tensor, ...], Callable[[], None]] | None:
            held = version.layers.get(layer)
            if held is None or not held.local_of[expert] >= 0:
                return None
            return held.parts(expert, moments=self._trains), intact

        return find


def _ids(layers: Layers) -> ExpertIds:
    return {index: layer.experts for index, layer in layers.items()}


__all__ = ["HostState"]
