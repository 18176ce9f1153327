"""A host's memory for recovery: copies of its own state and of others', by step, the newest two of each.

A copy's memory is used again for the next one. Whoever still reads it then notices, since it checks after
each piece; nobody is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from actors.host.expert_layers import LayerCopy, Layers, Parts
from actors.host.state_copies import Copy, check_experts
from actors.messages.tensor_stream import Inflow, read_head
from actors.messages.transfer_codec import (
    blob_frames,
    blob_from,
    empty_tensors,
    experts_from,
    stored_to,
    tensor_shapes,
)
from actors.messages.transfer_orders import EXPERTS, Blob, Stored
from errors import ProtocolError
from model.config import ModelConfig
from protos import expert_pb2

KEPT_STEPS = 2


class Memory:
    """Keeps copies; threads may call it at the same time.

    Args:
        host: the host's name.
        config: the model.
        dtype: of its experts.
    """

    def __init__(self, host: str, config: ModelConfig, dtype: torch.dtype) -> None:
        self._host = host
        self._config = config
        self._dtype = dtype
        self._lock = threading.Lock()
        self._copies: list[Copy] = []

    def own(self, step: int, epoch: int) -> Copy | None:
        """The copy of the host's own state, if there is one of this step and epoch."""
        with self._lock:
            return next((copy for copy in self._mine() if (copy.step, copy.epoch) == (step, epoch)), None)

    def take(self, step: int, epoch: int, layers: Layers) -> Copy:
        """Copy the host's own state, which must not change meanwhile.

        Raises:
            ProtocolError: it is being copied already.
        """
        with self._lock:
            before = [copy.step for copy in self._mine()]
        said = Stored(
            kind=EXPERTS,
            of=self._host,
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
            # What is older than what has gone now belongs to somebody who sends no more, and is of no use.
            with self._lock:
                self._remove(lambda one: one.complete and one.step < min(before))
        return copy

    def store(self, stream: Iterator[bytes]) -> None:
        """Keep what another host or a worker sends (see `Copy.frames`), unless two newer ones are kept.

        Raises:
            ProtocolError: the stream is malformed or ends early, or the same is being stored already.
            RaymoeError: from the stream.
        """
        said = read_head(stream)
        experts = experts_from(said.experts)
        self._check(said, experts)
        with self._lock:
            same = [c for c in self._copies if c.complete and (c.kind, c.of) == (said.kind, said.of)]
            if said.kind == EXPERTS and any((c.step, c.epoch) == (said.step, said.epoch) for c in same):
                return
            if sum(copy.step > said.step for copy in same) >= KEPT_STEPS:
                return
        copy = self._begin(said)
        try:
            Inflow(copy.memory()).read(_checked(stream, copy))
        except BaseException:
            self._drop(copy)
            raise
        self._finish(copy)

    def put(self, blob: Blob) -> None:
        """Keep named tensors."""
        self.store(blob_frames(blob))

    def get(self, name: str, step: int) -> Blob:
        """Named tensors as they were put, a copy.

        Raises:
            ProtocolError: they are not kept.
        """
        stream = self.read(name, step)
        said = read_head(stream)
        tensors = empty_tensors(said)
        Inflow(list(tensors.values())).read(stream)
        return blob_from(said, tensors)

    def read(self, name: str, step: int) -> Iterator[bytes]:
        """The same as a stream.

        Raises:
            ProtocolError: they are not kept.
        """
        with self._lock:
            for copy in self._copies:
                if copy.complete and copy.kind == copy.of == name and copy.step == step:
                    return copy.frames()
        raise ProtocolError(f"expert host {self._host} keeps no {name} of step {step}")

    def find(self, step: int, layer: int, expert: int) -> tuple[Parts, Callable[[], None]] | None:
        """An expert's parts at a step, of the host's own copy or of one that it keeps for another."""
        with self._lock:
            for copy in sorted(self._copies, key=lambda one: one.of != self._host):
                if copy.complete and copy.step == step and copy.kind == EXPERTS:
                    held = copy.layers.get(layer)
                    if held is not None and expert in held.experts:
                        return held.parts(expert, moments=True), copy.check
        return None

    def inventory(self) -> list[Stored]:
        """Every complete entry, by kind, owner and step."""
        with self._lock:
            kept = [copy.stored() for copy in self._copies if copy.complete]
        return sorted(kept, key=lambda one: (one.kind, one.of, one.step))

    def failed_pushes(self) -> int:
        """How many buddies lack a copy that is kept here."""
        return sum(len(one.failed) for one in self.inventory())

    def memory_bytes(self) -> int:
        """What all entries hold, complete or not."""
        with self._lock:
            return sum(tensor.nbytes for copy in self._copies for tensor in copy.memory())

    def rewind(self, step: int) -> None:
        """Drop all that is newer than a step: the run goes another way from there."""
        with self._lock:
            self._remove(lambda copy: copy.step > step)

    def _begin(self, said: expert_pb2.StoredState) -> Copy:
        """An entry to be filled, in the memory of an older one that goes.

        Raises:
            ProtocolError: one of the same owner is being filled, or its tensors cannot be.
        """
        experts = {layer: ids for layer, ids in experts_from(said.experts).items() if ids}
        with self._lock:
            layers, tensors = self._make_room(said, experts)
            if layers is None:
                layers = {layer: LayerCopy(ids, self._config, self._dtype) for layer, ids in experts.items()}
            if tensors is None:
                tensors = empty_tensors(said)
            copy = Copy(said.kind, said.of, said.step, said.epoch, layers, tensors, said.note)
            self._copies.append(copy)
            return copy

    def _make_room(
        self, said: expert_pb2.StoredState, experts: dict[int, tuple[int, ...]]
    ) -> tuple[dict[int, LayerCopy] | None, dict[str, Tensor] | None]:
        """Drop an owner's entries but the newest of another step; the memory of one that was shaped alike."""
        same = [copy for copy in self._copies if (copy.kind, copy.of) == (said.kind, said.of)]
        if any(not copy.complete for copy in same):
            raise ProtocolError(f"expert host {self._host} is storing {said.kind} of {said.of} already")
        others = sorted((copy for copy in same if copy.step != said.step), key=lambda copy: copy.step)
        kept = others[-(KEPT_STEPS - 1) :]
        dropped = [copy for copy in same if copy not in kept]
        self._remove(lambda copy: copy in dropped)
        for copy in dropped:
            if copy.stored().experts == experts and tensor_shapes(copy.tensors) == list(said.tensors):
                return copy.layers, copy.tensors
        return None, None

    def _finish(self, copy: Copy) -> None:
        with self._lock:
            copy.check()
            copy.complete = True

    def _drop(self, copy: Copy) -> None:
        with self._lock:
            self._remove(lambda one: one is copy)

    def _remove(self, unwanted: Callable[[Copy], bool]) -> None:
        for copy in self._copies:
            copy.gone = copy.gone or unwanted(copy)
        self._copies = [copy for copy in self._copies if not copy.gone]

    def _mine(self) -> list[Copy]:
        return [
            copy for copy in self._copies if copy.complete and (copy.kind, copy.of) == (EXPERTS, self._host)
        ]

    def _check(self, said: expert_pb2.StoredState, experts: dict[int, tuple[int, ...]]) -> None:
        if said.kind != EXPERTS and (said.kind != said.of or experts):
            raise ProtocolError(
                f"a stream carries {said.kind!r} of {said.of!r}, which is neither experts nor a blob"
            )
        if said.kind == EXPERTS:
            if said.of == self._host:
                raise ProtocolError(f"expert host {self._host} keeps its own experts itself")
            check_experts(self._config, experts)


def _checked(stream: Iterator[bytes], copy: Copy) -> Iterator[bytes]:
    for frame in stream:
        copy.check()
        yield frame


__all__ = ["KEPT_STEPS", "Memory"]
