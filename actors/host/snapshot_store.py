"""Copies of state kept in a host's memory for recovery: its own, and those of other hosts and of workers.

The newest two steps of each owner are kept. The memory of an older copy is reused for the next one; a reader
of the older copy checks it after each piece, and fails instead of delaying the new copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from actors.host.expert_layers import ExpertLayers, LayerCopy, Parts
from actors.host.state_copy import StateCopy, check_experts
from actors.messages.tensor_stream import TensorFiller, read_heading
from actors.messages.transfer_codec import (
    blob_frames,
    blob_from,
    empty_tensors,
    experts_from,
    stored_to,
    tensor_shapes,
)
from actors.messages.transfer_orders import EXPERTS, Blob, StoredCopy
from errors import ProtocolError
from model.config import ModelConfig
from protos import expert_pb2

KEPT_STEPS = 2


class SnapshotStore:
    """Keeps copies; several threads may call it at the same time.

    Args:
        host: Id of the host.
        config: The model.
        dtype: Type of its experts.
    """

    def __init__(self, host: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self._host = host
        self._config = config
        self._dtype = dtype
        self._lock = threading.Lock()
        self._copies: list[StateCopy] = []

    def own(self, step: int, epoch: int) -> StateCopy | None:
        """The copy of the host's own state at this step and epoch, or None."""
        with self._lock:
            return next((copy for copy in self._mine() if (copy.step, copy.epoch) == (step, epoch)), None)

    def take(self, step: int, epoch: int, layers: ExpertLayers) -> StateCopy:
        """Copy the host's own state, which must not change meanwhile.

        Raises:
            ProtocolError: another copy of it is under way.
        """
        with self._lock:
            before = [copy.step for copy in self._mine()]
        said = StoredCopy(
            kind=EXPERTS,
            owner=self._host,
            step=step,
            epoch=epoch,
            experts={index: layer.experts for index, layer in layers.items()},
        )
        copy = self._begin(stored_to(said))
        try:
            for index, layer in layers.items():
                copy.layers[index].take(layer)
        except BaseException:
            self._drop(copy)
            raise
        self._finish(copy)
        if len(before) == KEPT_STEPS:
            # Older copies belong to hosts or workers that have stopped sending; they are of no use.
            with self._lock:
                self._remove(lambda one: one.complete and one.step < min(before))
        return copy

    def store(self, stream: Iterator[bytes]) -> None:
        """Keep a copy sent by another host or a worker, unless two newer ones are kept.

        Raises:
            ProtocolError: the stream is malformed or ends early, or a copy of the same owner is being stored.
            RaymoeError: from the stream.
        """
        said = read_heading(stream)
        experts = experts_from(said.experts)
        self._check(said, experts)
        with self._lock:
            same = [c for c in self._copies if c.complete and (c.kind, c.owner) == (said.kind, said.owner)]
            if said.kind == EXPERTS and any((c.step, c.epoch) == (said.step, said.epoch) for c in same):
                return
            if sum(copy.step > said.step for copy in same) >= KEPT_STEPS:
                return
        copy = self._begin(said)
        try:
            TensorFiller(copy.memory()).read(_checked(stream, copy))
        except BaseException:
            self._drop(copy)
            raise
        self._finish(copy)

    def put(self, blob: Blob) -> None:
        """Keep named tensors."""
        self.store(blob_frames(blob))

    def get(self, name: str, step: int) -> Blob:
        """A copy of named tensors of a step.

        Raises:
            ProtocolError: they are not kept.
        """
        stream = self.read(name, step)
        said = read_heading(stream)
        tensors = empty_tensors(said)
        TensorFiller(list(tensors.values())).read(stream)
        return blob_from(said, tensors)

    def read(self, name: str, step: int) -> Iterator[bytes]:
        """Named tensors of a step as a stream of frames.

        Raises:
            ProtocolError: they are not kept.
        """
        with self._lock:
            for copy in self._copies:
                if copy.complete and copy.kind == copy.owner == name and copy.step == step:
                    return copy.frames()
        raise ProtocolError(f"expert host {self._host} keeps no {name} of step {step}")

    def find(self, step: int, layer: int, expert: int) -> tuple[Parts, Callable[[], None]] | None:
        """An expert's parts at a step in any copy, and a check that raises if they have changed; or None."""
        with self._lock:
            for copy in sorted(self._copies, key=lambda one: one.owner != self._host):
                if copy.complete and copy.step == step and copy.kind == EXPERTS:
                    held = copy.layers.get(layer)
                    if held is not None and expert in held.experts:
                        return held.parts(expert, moments=True), copy.check
        return None

    def inventory(self) -> list[StoredCopy]:
        """Every complete copy, ordered by kind, owner and step."""
        with self._lock:
            kept = [copy.stored() for copy in self._copies if copy.complete]
        return sorted(kept, key=lambda one: (one.kind, one.owner, one.step))

    def failed_pushes(self) -> int:
        """Number of copies that did not reach a buddy."""
        return sum(len(one.failed) for one in self.inventory())

    def memory_bytes(self) -> int:
        """Bytes of all copies, complete or not."""
        with self._lock:
            return sum(tensor.nbytes for copy in self._copies for tensor in copy.memory())

    def rewind(self, step: int) -> None:
        """Drop copies of later steps, because the run continues from this step."""
        with self._lock:
            self._remove(lambda copy: copy.step > step)

    def _begin(self, said: expert_pb2.StoredState) -> StateCopy:
        """A copy to be filled, in the memory of an older one if possible.

        Raises:
            ProtocolError: a copy of the same owner is being filled, or its tensors are not valid.
        """
        experts = {layer: ids for layer, ids in experts_from(said.experts).items() if ids}
        with self._lock:
            layers, tensors = self._make_room(said, experts)
            if layers is None:
                layers = {layer: LayerCopy(ids, self._config, self._dtype) for layer, ids in experts.items()}
            if tensors is None:
                tensors = empty_tensors(said)
            copy = StateCopy(said.kind, said.owner, said.step, said.epoch, layers, tensors, said.note)
            self._copies.append(copy)
            return copy

    def _make_room(
        self, said: expert_pb2.StoredState, experts: dict[int, tuple[int, ...]]
    ) -> tuple[dict[int, LayerCopy] | None, dict[str, Tensor] | None]:
        """Drop the owner's copies except the newest of another step; return memory of the same shape."""
        same = [copy for copy in self._copies if (copy.kind, copy.owner) == (said.kind, said.owner)]
        if any(not copy.complete for copy in same):
            raise ProtocolError(f"expert host {self._host} is storing {said.kind} of {said.owner} already")
        others = sorted((copy for copy in same if copy.step != said.step), key=lambda copy: copy.step)
        kept = others[-(KEPT_STEPS - 1) :]
        dropped = [copy for copy in same if copy not in kept]
        self._remove(lambda copy: copy in dropped)
        for copy in dropped:
            if copy.stored().experts == experts and tensor_shapes(copy.tensors) == list(said.tensors):
                return copy.layers, copy.tensors
        return None, None

    def _finish(self, copy: StateCopy) -> None:
        with self._lock:
            copy.check()
            copy.complete = True

    def _drop(self, copy: StateCopy) -> None:
        with self._lock:
            self._remove(lambda one: one is copy)

    def _remove(self, unwanted: Callable[[StateCopy], bool]) -> None:
        for copy in self._copies:
            copy.gone = copy.gone or unwanted(copy)
        self._copies = [copy for copy in self._copies if not copy.gone]

    def _mine(self) -> list[StateCopy]:
        return [
            copy
            for copy in self._copies
            if copy.complete and (copy.kind, copy.owner) == (EXPERTS, self._host)
        ]

    def _check(self, said: expert_pb2.StoredState, experts: dict[int, tuple[int, ...]]) -> None:
        if said.kind != EXPERTS and (said.kind != said.owner or experts):
            raise ProtocolError(
                f"a stream carries {said.kind!r} of {said.owner!r}, which is neither experts nor a blob"
            )
        if said.kind == EXPERTS:
            if said.owner == self._host:
                raise ProtocolError(f"expert host {self._host} keeps its own experts itself")
            check_experts(self._config, experts)


def _checked(stream: Iterator[bytes], copy: StateCopy) -> Iterator[bytes]:
    for frame in stream:
        copy.check()
        yield frame


__all__ = ["KEPT_STEPS", "SnapshotStore"]
