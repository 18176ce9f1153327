"""Stands for a GPU's memory and its order of events, within a process: strict about who may do what when."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from channels.device_memory import DeviceSegment
from errors import ProtocolError


@dataclass
class Shared:
    """One segment, as both ends see it."""

    memory: Tensor
    state: str = "read"  # written and not yet read, or read
    busy: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def step(self, begins: bool, at: str, then: str) -> None:
        with self.guard:
            assert self.state == at and self.busy is not begins, (self.state, self.busy, at, then)
            self.state, self.busy = then, begins


@dataclass
class Segment:
    """One end's view."""

    shared: Shared

    @property
    def memory(self) -> Tensor:
        return self.shared.memory

    def before_writing(self) -> None:
        self.shared.step(True, "read", "read")

    def written(self) -> None:
        self.shared.step(False, "read", "written")

    def before_reading(self) -> None:
        self.shared.step(True, "written", "written")

    def read(self) -> None:
        self.shared.step(False, "written", "read")


class PretendedMemory:
    """Takes every tensor of the CPU."""

    known: dict[bytes, Shared] = {}  # noqa: RUF012
    numbers = itertools.count()

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        handle = f"segment {next(self.numbers)}".encode()
        self.known[handle] = Shared(torch.full((capacity,), 0xAB, dtype=torch.uint8))
        return Segment(self.known[handle]), handle

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        shared = self.known.get(handle)
        if shared is None or shared.memory.numel() != capacity:
            raise ProtocolError(f"no segment {handle!r} of {capacity} bytes")
        return Segment(shared)


__all__ = ["PretendedMemory"]
