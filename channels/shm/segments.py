"""Segments of shared memory: sealed memfds without names, mapped once at each end and reused.

Each direction of a connection has a pool of segments at its writer and a mirror of it at its reader. A
segment's file descriptor travels with the first message that uses it and lives as long as its mapping
(Python's mmap keeps a duplicate); both end with their processes, so that nothing is left behind.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch

from channels.framing.buffers import address_of, tensor_at
from channels.framing.header import TensorSpan
from errors import ProtocolError, ResourceError

MAX_SEGMENTS: Final = 256
MAX_CAPACITY: Final = 1 << 40
_GRAIN: Final = 1 << 16
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


S = TypeVar("S")
H = TypeVar("H")


class SegmentPool(Generic[S, H]):
    """The segments of memory that this end of a connection writes, which are used again.

    Args:
        make: (number, bytes) -> a new segment, and the handle for the peer to open it.
        capacity: Returns the bytes of a segment.
        most: Most segments.
    """

    def __init__(
        self, make: Callable[[int, int], tuple[S, H]], capacity: Callable[[S], int], most: int
    ) -> None:
        self._make, self._capacity, self._most = make, capacity, most
        self._segments: dict[int, S] = {}
        self._free: set[int] = set()

    def take(self, size: int) -> tuple[int, S, H | None]:
        """A free segment of at least `size` bytes, with its number, and its handle if it is new.

        Raises:
            ResourceError: There is no memory for it.
            ProtocolError: The peer has released none of the segments.
        """
        fitting = [number for number in self._free if self._capacity(self._segments[number]) >= size]
        if fitting:
            number = fitting[0] if len(fitting) == 1 else min(fitting, key=self._size)
            self._free.remove(number)
            return number, self._segments[number], None
        # A free one that is too small is replaced, so that a pool follows its largest payloads.
        number = next(iter(self._free)) if self._free else self._unused()
        # Room for a quarter more: payloads differ from call to call, and a new segment is expensive.
        segment, handle = self._make(number, size + size // 4)
        self._free.discard(number)
        self._segments[number] = segment
        return number, segment, handle

    def forget(self, number: int) -> None:
        """Drop a segment that the peer has not been told of."""
        self._segments.pop(number, None)
        self._free.discard(number)

    def release(self, number: int) -> None:
        """Free a segment, which the peer has released.

        Raises:
            ProtocolError: It was not in use.
        """
        if number not in self._segments or number in self._free:
            raise ProtocolError(f"the peer released segment {number}, which is not in use")
        self._free.add(number)

    def clear(self) -> None:
        """Drop all segments; memory that tensors are views of lives on."""
        self._free.clear()
        self._segments.clear()

    def _unused(self) -> int:
        """The number for a new segment: the first that is not in use."""
        for number in range(self._most):
            if number not in self._segments:
                return number
        raise ProtocolError(
            f"the peer has released none of {self._most} segments of memory; drop earlier replies"
        )

    def _size(self, number: int) -> int:
        return self._capacity(self._segments[number])


class ShmSegment:
    """One mapped segment; views of `memory` keep it alive."""

    __slots__ = ("_spans", "_views", "address", "capacity", "index", "memory")

    def __init__(self, index: int, descriptor: int, capacity: int) -> None:
        self.index = index
        self.capacity = capacity
        # Page faults happen here, once, and not within a call.
        mapped = mmap.mmap(descriptor, capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.memory: np.ndarray[Any, Any] = np.frombuffer(mapped, np.uint8)
        self.address = address_of(self.memory)
        self._spans: tuple[TensorSpan, ...] = ()
        self._views: tuple[torch.Tensor, ...] = ()

    def views(self, spans: tuple[TensorSpan, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors at some spans; the last ones are cached, as payloads of one layout repeat."""
        if spans is not self._spans:
            self._views = tuple([tensor_at(self.memory, self.address, where) for where in spans])
            self._spans = spans
        return self._views


def new_segment(index: int, size: int) -> tuple[ShmSegment, int]:
    """A segment of at least `size` bytes, zeros, and its descriptor, which the caller closes.

    Raises:
        ResourceError: The system gives no memory or descriptor.
    """
    capacity = -(-size // _GRAIN) * _GRAIN
    try:
        descriptor = os.memfd_create("raymoe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, capacity)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return ShmSegment(index, descriptor, capacity), descriptor
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise ResourceError(f"no {capacity} bytes of shared memory: {error}") from error


def sealed_segment(index: int, descriptor: int, capacity: int) -> ShmSegment:
    """Map a segment of the peer; the caller closes the descriptor.

    Raises:
        ProtocolError: It differs from the peer's description, or could be truncated while it is read.
    """
    if not 0 < capacity <= MAX_CAPACITY:
        raise ProtocolError(f"the peer sends segment {index} of {capacity} bytes, beyond every limit")
    try:
        if os.fstat(descriptor).st_size != capacity:
            raise ProtocolError(f"segment {index} does not have the {capacity} bytes that the peer announces")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ProtocolError(f"segment {index} is not sealed against cutting")
        return ShmSegment(index, descriptor, capacity)
    except (OSError, ValueError) as error:
        raise ProtocolError(f"segment {index} cannot be mapped: {error}") from error


def shm_pool() -> SegmentPool[ShmSegment, int]:
    """A pool of shared memory; handles are descriptors, which the caller of `take` closes."""
    return SegmentPool(new_segment, lambda segment: segment.capacity, MAX_SEGMENTS)


class SegmentMirror:
    """The peer's segments, which this end reads."""

    def __init__(self) -> None:
        self._segments: dict[int, ShmSegment] = {}

    def attach(self, index: int, descriptor: int, capacity: int) -> None:
        """Map a new segment; the caller closes the descriptor.

        Raises:
            ProtocolError: It differs from the peer's description, or could be truncated while it is read.
        """
        if index >= MAX_SEGMENTS:
            raise ProtocolError(f"the peer sends segment {index}, {MAX_SEGMENTS} at most")
        self._segments[index] = sealed_segment(index, descriptor, capacity)

    def get(self, index: int, size: int) -> ShmSegment:
        """The segment of a message with `size` bytes.

        Raises:
            ProtocolError: There is none, or it is smaller.
        """
        segment = self._segments.get(index)
        if segment is None or segment.capacity < size:
            raise ProtocolError(f"the peer writes {size} bytes to segment {index}, which is smaller")
        return segment

    def clear(self) -> None:
        """Unmap all segments except those that tensors are views of."""
        self._segments.clear()


__all__ = [
    "MAX_CAPACITY",
    "MAX_SEGMENTS",
    "SegmentMirror",
    "SegmentPool",
    "ShmSegment",
    "new_segment",
    "sealed_segment",
    "shm_pool",
]
