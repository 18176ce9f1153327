"""A stand-in for GPU memory that processes share, and for its events, which checks the order of accesses."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from channels.cuda.device_memory import DeviceSegment
from errors import ProtocolError

_READ, _WRITING, _WRITTEN, _READING = range(4)


@dataclass
class Segment:
    """One end's view of a segment; its last byte says which access is under way."""

    whole: Tensor

    @property
    def memory(self) -> Tensor:
        return self.whole[:-1]

    def before_writing(self) -> None:
        self._step(_READ, _WRITING)

    def written(self) -> None:
        self._step(_WRITING, _WRITTEN)

    def before_reading(self) -> None:
        self._step(_WRITTEN, _READING)

    def read(self) -> None:
        self._step(_READING, _READ)

    def _step(self, at: int, then: int) -> None:
        assert int(self.whole[-1]) == at, (int(self.whole[-1]), at, then)
        self.whole[-1] = then


class PretendedMemory:
    """Device memory that accepts every CPU tensor."""

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        descriptor, path = tempfile.mkstemp()
        os.ftruncate(descriptor, capacity + 1)
        os.close(descriptor)
        return Segment(_map(path, capacity)), path.encode()

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        path = handle.decode(errors="replace")
        if (
            "\0" in path
            or not path.startswith(tempfile.gettempdir())
            or os.path.getsize(path) != capacity + 1
        ):
            raise ProtocolError(f"no segment {path} of {capacity} bytes")
        segment = Segment(_map(path, capacity))
        os.unlink(path)
        return segment


def _map(path: str, capacity: int) -> Tensor:
    return torch.from_file(path, shared=True, size=capacity + 1, dtype=torch.uint8)


__all__ = ["PretendedMemory"]
