"""Memory of a device that two processes share, in segments that one writes and the other reads.

No end waits for the device: each records an event after its last use of a segment, and lets the device wait
for the other end's event before its own next use.
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
        """Let later work run after all work that the reader had queued when it called `read`."""
        ...

    def written(self) -> None:
        """Record that the writer has queued its last write of this message."""
        ...

    def before_reading(self) -> None:
        """Let later work run after all work that the writer had queued when it called `written`."""
        ...

    def read(self) -> None:
        """Record that the reader has queued its last read of this message."""
        ...


class DeviceMemory(Protocol):
    """Makes segments of a device's memory, and opens those of other processes."""

    def takes(self, device: torch.device) -> bool:
        """Whether this is the memory of a device."""
        ...

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        """A new segment, and the handle for another process to open it.

        Raises:
            ResourceError: The device gives no memory, or none that can be shared.
        """
        ...

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        """Open another process's segment.

        Raises:
            ProtocolError: The handle is malformed, or of another device.
        """
        ...


class DevicePool(SegmentPool[DeviceSegment, bytes]):
    """The segments that this end writes.

    A segment that the peer has open is freed when the peer closes it; if the peer was killed, at the end of
    this process.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        def make(_: int, size: int) -> tuple[DeviceSegment, bytes]:
            return memory.make(-(-size // _GRAIN) * _GRAIN)

        super().__init__(make, lambda segment: segment.memory.numel(), MAX_SEGMENTS)


__all__ = ["DeviceMemory", "DevicePool", "DeviceSegment"]
