"""Memory of a device that two processes share, in segments which one writes and the other reads.

Neither end waits: each tells the device when it has queued its last use of a segment, and has the device wait
for the other's before its own next one.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from errors import ProtocolError

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
            ResourceError: the device gives no memory.
        """
        ...

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        """Another process's segment.

        Raises:
            ProtocolError: the handle is none, or of another device.
        """
        ...


class DevicePool:
    """The segments that this end writes."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._segments: dict[int, DeviceSegment] = {}
        self._free: set[int] = set()

    def acquire(self, size: int) -> tuple[int, DeviceSegment, bytes]:
        """A free segment of at least `size` bytes, with its number, and its handle where it is new, else b"".

        Raises:
            ResourceError: the device gives no memory.
            ProtocolError: the peer holds on to every segment there may be.
        """
        fitting = [number for number in self._free if self._segments[number].memory.numel() >= size]
        if fitting:
            number = min(fitting, key=lambda one: self._segments[one].memory.numel())
            self._free.remove(number)
            return number, self._segments[number], b""
        # A free one that is too small makes way, so that a pool follows its largest payloads.
        number = next(iter(self._free), len(self._segments))
        if number >= MAX_SEGMENTS:
            raise ProtocolError(f"the peer holds on to {MAX_SEGMENTS} segments of device memory")
        # Room for a quarter more: rows differ from call to call, and a new segment costs a handle.
        segment, handle = self._memory.make(-(-(size + size // 4) // _GRAIN) * _GRAIN)
        self._free.discard(number)
        self._segments[number] = segment
        return number, segment, handle

    def release(self, number: int) -> None:
        """The peer is done with a segment.

        Raises:
            ProtocolError: it was not in use.
        """
        if number not in self._segments or number in self._free:
            raise ProtocolError(f"the peer gave back device segment {number}, which it did not have")
        self._free.add(number)

    def clear(self) -> None:
        """Drop all. What a peer has open is given back when that closes it; if it was killed, not before the
        end of this process."""
        self._segments.clear()
        self._free.clear()


__all__ = ["MAX_SEGMENTS", "DeviceMemory", "DevicePool", "DeviceSegment"]
