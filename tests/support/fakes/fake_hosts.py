"""Expert hosts without weights: they record the experts of each epoch and refuse impossible orders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.messages.host_control import HostStats
from actors.messages.transfer_orders import EXPERTS, Assembly, Blob, StoredCopy
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, ProtocolError, RemoteError

Held = dict[int, tuple[int, ...]]


class FakeHost:
    """A fake host; implements `actors.messages.steps.HostControl`.

    Attributes:
        calls: The calls that concern steps, in order.
        held: Epoch -> layer -> experts.
        kept: Snapshots, own and others': (owner, step) -> layer -> experts.
        gate: Commits wait until it is set.
        closed: Set when a client of this host has been closed.
        on_assemble: Called in the middle of an assembly.
        pulled, read: Number of experts that came from a peer, and from a directory.
    """

    def __init__(self, id: str, world: dict[str, FakeHost], *, squared: float = 4.0) -> None:
        self.id, self.world, self.squared = id, world, squared
        world[id] = self
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed = threading.Event()
        self.dead = self.hung = False
        self.held: dict[int, Held] = {0: {}}
        self.orders: dict[int, Assembly] = {}
        self.kept: dict[tuple[str, int], Held] = {}
        self.blobs: dict[tuple[str, int], Blob] = {}
        self.on_assemble: Callable[[], None] | None = None
        self.counted: Tensor | None = None
        self.busy_seconds = 0.0
        self.in_flight = 0
        self.pulled = self.read = 0

    def _up(self) -> None:
        if self.dead:
            raise ChannelError(f"expert host {self.id} cannot be reached")
        if self.hung:
            assert self.closed.wait(20)
            raise ChannelError(f"expert host {self.id} has been given up")

    # --- life

    def ping(self, timeout: float) -> None:
        if self.hung:
            raise ChannelTimeout(f"expert host {self.id} did not answer in time")
        self._up()

    def close(self) -> None:
        self.closed.set()

    def stats(self) -> HostStats:
        self._up()
        current = self.held[max(self.held)]
        return HostStats(
            id=self.id,
            step=0,
            epoch=max(self.held),
            kept=0,
            kept_bytes=0,
            parameters=0,
            requests={},
            rows=0,
            busy_seconds=self.busy_seconds,
            in_flight=self.in_flight,
            epochs=tuple(self.held),
            experts={layer: len(ids) for layer, ids in current.items()},
        )

    def loads(self) -> Tensor:
        self._up()
        assert self.counted is not None
        return self.counted

    # --- experts

    def assemble(self, order: Assembly) -> None:
        self._up()
        if self.orders.get(order.epoch) == order:
            return
        if self.held.get(order.epoch):
            raise ProtocolError(f"expert host {self.id} holds epoch {order.epoch} already")
        if self.on_assemble is not None:
            self.on_assemble()
            self._up()
        for layer, experts in order.experts.items():
            for expert in experts:
                if not self.has(order, layer, expert):
                    self._get(order, layer, expert)
        self.held[order.epoch] = {layer: tuple(ids) for layer, ids in order.experts.items()}
        self.orders[order.epoch] = order

    def has(self, order: Assembly, layer: int, expert: int) -> bool:
        if order.base is not None:
            return expert in self.held.get(order.base, {}).get(layer, ())
        kept = [held for (_, step), held in self.kept.items() if step == order.step]
        return any(expert in held.get(layer, ()) for held in kept)

    def _get(self, order: Assembly, layer: int, expert: int) -> None:
        for origin in order.origins:
            if expert in origin.experts.get(layer, ()):
                peer = self.world[origin.host.id]
                if peer.dead or peer.hung:
                    raise ChannelError(f"expert host {self.id} could not pull from {peer.id}")
                if not peer.has(order, layer, expert):
                    raise RemoteError(f"expert host {peer.id} has no expert {expert} of layer {layer}")
                self.pulled += 1
                return
        if order.directory is None:
            raise ProtocolError(f"expert host {self.id} finds expert {expert} of layer {layer} nowhere")
        self.read += 1

    def retain(self, *epochs: int) -> None:
        self._up()
        if not epochs or not set(epochs) <= set(self.held):
            raise ProtocolError(f"expert host {self.id} holds {sorted(self.held)}, not {epochs}")
        self.held = {epoch: self.held[epoch] for epoch in epochs}

    # --- steps

    def seal(self, step: int, epoch: int | None = None) -> None:
        self._up()

    def prepare(self, step: int, epoch: int | None = None) -> float:
        self._up()
        self.calls.append(("prepare", step))
        return self.squared

    def commit(self, step: int, learning_rate: float, scale: float, epoch: int | None = None) -> None:
        assert self.gate.wait(20)
        self._up()
        if self.error is not None:
            raise self.error
        self.calls.append(("commit", step, learning_rate, scale))

    def save(self, directory: str, epoch: int | None = None) -> list[str]:
        self._up()
        self.calls.append(("save", directory))
        return [f"{directory}/{self.id}"]

    # --- memory

    def snapshot(self, step: int, buddies: Sequence[HostInfo], epoch: int | None = None) -> None:
        self._up()
        mine = dict(self.held[max(self.held)])
        self.kept[self.id, step] = mine
        for buddy in buddies:
            self.world[buddy.id].kept[self.id, step] = mine

    def put(self, blob: Blob) -> None:
        self._up()
        self.blobs[blob.name, blob.step] = blob

    def get(self, name: str, step: int) -> Blob:
        self._up()
        return self.blobs[name, step]

    def inventory(self) -> list[StoredCopy]:
        self._up()
        own = [
            StoredCopy(kind=EXPERTS, owner=of, step=step, experts=held, pushed=tuple(self.world))
            for (of, step), held in self.kept.items()
        ]
        return own + [StoredCopy(kind=name, owner=name, step=step) for name, step in self.blobs]


def zeros(layers: int, experts: int) -> Tensor:
    """Loads of zero, `[layers, experts]`."""
    return torch.zeros(layers, experts, dtype=torch.int64)


__all__ = ["FakeHost", "zeros"]
