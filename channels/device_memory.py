"""Memory of a device that two processes share, in segments which one writes and the other reads.

Neither end waits: each tells the device when it has queued its last use of a segment, and has the device wait
for the other's before its own next one.
"""

from __future__ import annotations

import struct
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from errors import ProtocolError, ResourceError

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
        segment, handle = self._memory.make(-(-size // _GRAIN) * _GRAIN)
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
        """Drop all."""
        self._segments.clear()
        self._free.clear()


class CudaMemory:
    """Memory of one GPU, by CUDA's handles for other processes."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())

    def takes(self, device: torch.device) -> bool:
        """See `DeviceMemory.takes`."""
        return device == self._device

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        """See `DeviceMemory.make`."""
        try:
            memory = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise ResourceError(f"no {capacity} bytes of the GPU's memory: {error}") from None
        made: Any = torch.cuda.Event
        events = [made(interprocess=True) for _ in range(2)]
        for event in events:
            event.record()  # a handle is of an event that has been recorded
        shared: Any = memory.untyped_storage()
        handle = _packed([*shared._share_cuda_(), *(bytes(event.ipc_handle()) for event in events)])
        return _CudaSegment(memory, *events), handle

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        """See `DeviceMemory.open`."""
        try:
            *storage, written, read = _unpacked(handle)
            storage[0] = self._device.index  # the peer's number of it may be another
            opened = torch.UntypedStorage._new_shared_cuda(*storage)
            memory = torch.empty(0, dtype=torch.uint8, device=self._device).set_(opened)[:capacity]
            made: Any = torch.cuda.Event
            events = [made.from_ipc_handle(self._device, one) for one in (written, read)]
        except (RuntimeError, TypeError, ValueError, struct.error) as error:
            raise ProtocolError(f"the peer's device memory cannot be opened: {error}") from None
        if memory.numel() != capacity:
            raise ProtocolError(f"the peer's device memory has not the {capacity} bytes that it says")
        return _CudaSegment(memory, *events)


class _CudaSegment:
    def __init__(self, memory: Tensor, written: torch.cuda.Event, read: torch.cuda.Event) -> None:
        self.memory, self._written, self._read = memory, written, read

    def before_writing(self) -> None:
        self._read.wait()

    def written(self) -> None:
        self._written.record()

    def before_reading(self) -> None:
        self._written.wait()

    def read(self) -> None:
        self._read.record()


_BYTES, _INT, _BOOL = 0, 1, 2


def _packed(values: list[Any]) -> bytes:
    """Integers, booleans and bytes, each with its kind."""
    parts = []
    for value in values:
        if isinstance(value, bool):
            parts.append(struct.pack("<BB", _BOOL, value))
        elif isinstance(value, int):
            parts.append(struct.pack("<Bq", _INT, value))
        else:
            parts.append(struct.pack("<BH", _BYTES, len(value)) + value)
    return b"".join(parts)


def _unpacked(packed: bytes) -> list[Any]:
    """The inverse of `_packed`.

    Raises:
        struct.error, ValueError: it is none.
    """
    values: list[Any] = []
    at = 0
    while at < len(packed):
        kind, at = packed[at], at + 1
        if kind == _BYTES:
            (length,) = struct.unpack_from("<H", packed, at)
            at += 2 + length
            if at > len(packed):
                raise ValueError("it ends too early")
            values.append(packed[at - length : at])
        elif kind in (_INT, _BOOL):
            form = "<q" if kind == _INT else "<B"
            (value,) = struct.unpack_from(form, packed, at)
            values.append(bool(value) if kind == _BOOL else value)
            at += struct.calcsize(form)
        else:
            raise ValueError(f"a value of kind {kind}")
    return values


__all__ = ["CudaMemory", "DeviceMemory", "DevicePool", "DeviceSegment"]
