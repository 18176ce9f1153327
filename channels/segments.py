"""Shared memory without names: sealed memfds, mapped once at each end and used again and again.

Each direction of a connection has a pool at its writer and a mirror of it at its reader. A segment's
file descriptor travels with the first message that uses it and lives as long as its mapping (Python's
mmap keeps a duplicate); both die with the processes, so that nothing is left behind whoever dies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any, Final

import numpy as np

from channels.codec import address_of
from errors import ProtocolError

MAX_SEGMENTS: Final = 256
MAX_CAPACITY: Final = 1 << 40
_GRAIN: Final = 1 << 16
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """One mapping. Views of `memory` keep it alive."""

    __slots__ = ("address", "capacity", "index", "memory")

    def __init__(self, index: int, descriptor: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        # Page faults are paid for here, once, and not within a call.
        mapped = mmap.mmap(descriptor, capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.memory: np.ndarray[Any, Any] = np.frombuffer(mapped, np.uint8)
        self.address = address_of(self.memory)


class SegmentPool:
    """The segments that this end writes."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._free: set[int] = set()

    def acquire(self, size: int) -> tuple[Segment, int | None]:
        """A free segment of at least `size` bytes, and its descriptor if it is new (the caller closes it).

        Raises:
            OSError: the system gives no memory.
            ProtocolError: the peer holds on to every segment there may be.
        """
        fitting = [index for index in self._free if self._segments[index].capacity >= size]
        if fitting:
            index = min(fitting, key=lambda number: self._segments[number].capacity)
            self._free.remove(index)
            return self._segments[index], None
        # A free one that is too small makes way, so that a pool follows its largest payloads.
        index = self._free.pop() if self._free else len(self._segments)
        if index >= MAX_SEGMENTS:
            raise ProtocolError(f"the peer holds on to {index} shared memory segments; release results")
        capacity = -(-(size + size // 4) // _GRAIN) * _GRAIN
        descriptor = os.memfd_create("raymoe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, capacity)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            segment = Segment(index, descriptor, capacity)
        except BaseException:
            os.close(descriptor)
            raise
        self._segments[index] = segment
        return segment, descriptor

    def release(self, index: int) -> None:
        """The peer is done with a segment.

        Raises:
            ProtocolError: it was not in use.
        """
        if index not in self._segments or index in self._free:
            raise ProtocolError(f"the peer gave back segment {index}, which it did not have")
        self._free.add(index)

    def clear(self) -> None:
        """Unmap what nobody reads."""
        self._free.clear()
        self._segments.clear()


class SegmentMirror:
    """The segments that the peer writes and this end reads."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def attach(self, index: int, descriptor: int, capacity: int) -> None:
        """Map a new segment; the caller closes the descriptor.

        Raises:
            ProtocolError: it is not what the peer says, or could be cut short while it is read.
        """
        if index >= MAX_SEGMENTS or not 0 < capacity <= MAX_CAPACITY:
            raise ProtocolError(f"the peer sends segment {index} of {capacity} bytes, beyond every limit")
        try:
            if os.fstat(descriptor).st_size != capacity:
                raise ProtocolError(f"segment {index} has not the {capacity} bytes that the peer says")
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError(f"segment {index} is not sealed against cutting")
            self._segments[index] = Segment(index, descriptor, capacity)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"segment {index} cannot be mapped: {error}") from error

    def get(self, index: int, size: int) -> Segment:
        """The segment of a message with `size` bytes.

        Raises:
            ProtocolError: there is none, or it is smaller.
        """
        segment = self._segments.get(index)
        if segment is None or segment.capacity < size:
            raise ProtocolError(f"the peer writes {size} bytes to segment {index}, which has not that many")
        return segment

    def clear(self) -> None:
        """Unmap what nobody reads."""
        self._segments.clear()


__all__ = ["MAX_CAPACITY", "MAX_SEGMENTS", "Segment", "SegmentMirror", "SegmentPool"]
