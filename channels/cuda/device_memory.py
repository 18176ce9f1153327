"""Memory of a device that two processes share, in segments which one writes and the other reads.

Neither end waits: each tells the device when it has queued its last use of a segment, and has the device wait
for the other's before its own next one.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from channels.shm.segments import SegmentPool

MAX_SEGMENTS: Final = 64
_GRAIN: Final = 1 << 16


class DeviceSegment(Protocol):
    """One end's view of a segment."""

    @property
    def memory(self) -> Tensor:
        """[capacity] uint8, on the device."""
        ...

    def before_writing(self) -> None:
        """What is queued from here on runs after all that the reader had queued when it called `read`."""
        ...

    def written(self) -> None:
        """The writer has queued its last write for now."""
        ...

    def before_reading(self) -> None:
        """What is queued from here on runs after all that the writer had queued when it called `written`."""
        ...

    def read(self) -> None:
        """The reader has queued its last read for now."""
        ...


class DeviceMemory(Protocol):
    """Makes segments, and opens those of other processes."""

    def takes(self, device: torch.device) -> bool:
        """Whether tensors of a device go through it."""
        ...

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        """A segment, and what another process opens it with.

        Raises:
            ResourceError: the device gives no memory, or none that can be shared.
        """
        ...

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        """Another process's segment.

        Raises:
            ProtocolError: the handle is none, or of another device.
        """
        ...


class DevicePool(SegmentPool[DeviceSegment, bytes]):
    """The segments that this end writes. What a peer has open is given back when that closes it; if it was
    killed, not before the end of this process."""

    def __init__(self, memory: DeviceMemory) -> None:
        def make(_: int, size: int) -> tuple[DeviceSegment, bytes]:
            return memory.make(-(-size // _GRAIN) * _GRAIN)

        super().__init__(make, lambda segment: segment.memory.numel(), MAX_SEGMENTS)


__all__ = ["DeviceMemory", "DevicePool", "DeviceSegment"]
