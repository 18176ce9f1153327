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
import torch

from channels.framing.codec import address_of, tensor_at
from channels.framing.header import Placement
from channels.shm.pool import Pool
from errors import ProtocolError, ResourceError

MAX_SEGMENTS: Final = 256
MAX_CAPACITY: Final = 1 << 40
_GRAIN: Final = 1 << 16
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """One mapping. Views of `memory` keep it alive."""

    __slots__ = ("_placed", "_views", "address", "capacity", "index", "memory")

    def __init__(self, index: int, descriptor: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        # Page faults are paid for here, once, and not within a call.
        mapped = mmap.mmap(descriptor, capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.memory: np.ndarray[Any, Any] = np.frombuffer(mapped, np.uint8)
        self.address = address_of(self.memory)
        self._placed: tuple[Placement, ...] = ()
        self._views: tuple[torch.Tensor, ...] = ()

    def views(self, placed: tuple[Placement, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors that lie there. The last ones are remembered: payloads of one layout come in a row."""
        if placed is not self._placed:
            self._views = tuple([tensor_at(self.memory, self.address, where) for where in placed])
            self._placed = placed
        return self._views


def new_segment(index: int, size: int) -> tuple[Segment, int]:
    """A segment of at least `size` bytes, zeros, and its descriptor, which the caller closes.

    Raises:
        ResourceError: the system gives no memory or descriptor.
    """
    capacity = -(-size // _GRAIN) * _GRAIN
    try:
        descriptor = os.memfd_create("raymoe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, capacity)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return Segment(index, descriptor, capacity), descriptor
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise ResourceError(f"no {capacity} bytes of shared memory: {error}") from error


def sealed_segment(index: int, descriptor: int, capacity: int) -> Segment:
    """Map a segment of the peer's; the caller closes the descriptor.

    Raises:
        ProtocolError: it is not what the peer says, or could be cut short while it is read.
    """
    if not 0 < capacity <= MAX_CAPACITY:
        raise ProtocolError(f"the peer sends segment {index} of {capacity} bytes, beyond every limit")
    try:
        if os.fstat(descriptor).st_size != capacity:
            raise ProtocolError(f"segment {index} has not the {capacity} bytes that the peer says")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ProtocolError(f"segment {index} is not sealed against cutting")
        return Segment(index, descriptor, capacity)
    except (OSError, ValueError) as error:
        raise ProtocolError(f"segment {index} cannot be mapped: {error}") from error


class SegmentPool(Pool[Segment, int]):
    """The segments that this end writes; handles are descriptors, which whoever takes a new one closes."""

    def __init__(self) -> None:
        super().__init__(new_segment, _capacity, MAX_SEGMENTS)

    def acquire(self, size: int) -> tuple[Segment, int | None]:
        """A free segment of at least `size` bytes, and its descriptor if it is new; see `Pool.take`."""
        _, segment, descriptor = self.take(size)
        return segment, descriptor


def _capacity(segment: Segment) -> int:
    return segment.capacity


class SegmentMirror:
    """The segments that the peer writes and this end reads."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def attach(self, index: int, descriptor: int, capacity: int) -> None:
        """Map a new segment; the caller closes the descriptor.

        Raises:
            ProtocolError: it is not what the peer says, or could be cut short while it is read.
        """
        if index >= MAX_SEGMENTS:
            raise ProtocolError(f"the peer sends segment {index}, {MAX_SEGMENTS} at most")
        self._segments[index] = sealed_segment(index, descriptor, capacity)

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


__all__ = [
    "MAX_CAPACITY",
    "MAX_SEGMENTS",
    "Segment",
    "SegmentMirror",
    "SegmentPool",
    "new_segment",
    "sealed_segment",
]
