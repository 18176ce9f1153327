"""Memory of one GPU that processes share by CUDA's handles, and the events that order their work on it."""

from __future__ import annotations

import struct
from typing import Any, Final

import torch
from torch import Tensor

from channels.cuda.device_memory import DeviceSegment
from errors import ProtocolError, ResourceError

_STORAGE: Final = 8
"""Number of values of torch's handle of a storage (`torch.multiprocessing.reductions`)."""
_BYTES, _INT, _BOOL = 0, 1, 2


class CudaMemory:
    """The `DeviceMemory` of a GPU.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", device.index or 0)

    def takes(self, device: torch.device) -> bool:
        return device == self._device

    def make(self, capacity: int) -> tuple[DeviceSegment, bytes]:
        made: Any = torch.cuda.Event
        try:
            with torch.cuda.device(self._device):
                memory = torch.empty(capacity, dtype=torch.uint8, device=self._device)
                events = [made(interprocess=True) for _ in range(2)]
                for event in events:
                    event.record()  # an event has a handle once it has been recorded
                shared: Any = memory.untyped_storage()
                told = [*shared._share_cuda_(), *(bytes(event.ipc_handle()) for event in events)]
        except RuntimeError as error:  # the memory is full, or the driver cannot share it
            raise ResourceError(f"no {capacity} bytes of the GPU's memory to share: {error}") from None
        return CudaSegment(memory, *events), packed(told)

    def open(self, handle: bytes, capacity: int) -> DeviceSegment:
        made: Any = torch.cuda.Event
        try:
            told = unpacked(handle)
            if len(told) != _STORAGE + 2:
                raise ValueError(f"a handle of {len(told)} values")
            storage = [self._device.index, *told[1:_STORAGE]]  # the peer may number the GPUs differently
            opened = torch.UntypedStorage._new_shared_cuda(*storage)
            memory = torch.empty(0, dtype=torch.uint8, device=self._device).set_(opened)[:capacity]
            events = [made.from_ipc_handle(self._device, one) for one in told[_STORAGE:]]
        except (RuntimeError, TypeError, ValueError, struct.error) as error:
            raise ProtocolError(f"the peer's device memory cannot be opened: {error}") from None
        if memory.numel() != capacity:
            raise ProtocolError(
                f"the peer's device memory does not have the {capacity} bytes that it announces"
            )
        return CudaSegment(memory, *events)


class CudaSegment:
    """A `DeviceSegment` of a GPU, with an event for each end's last use."""

    def __init__(self, memory: Tensor, written: torch.cuda.Event, read: torch.cuda.Event) -> None:
        self.memory, self._written, self._read = memory, written, read

    def before_writing(self) -> None:
        self._read.wait(self._stream)

    def written(self) -> None:
        self._written.record(self._stream)

    def before_reading(self) -> None:
        self._written.wait(self._stream)

    def read(self) -> None:
        self._read.record(self._stream)

    @property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.memory.device)


def packed(values: list[Any]) -> bytes:
    """Encode integers, booleans and bytes, each with its kind."""
    parts = []
    for value in values:
        if isinstance(value, bool):
            parts.append(struct.pack("<BB", _BOOL, value))
        elif isinstance(value, int):
            parts.append(struct.pack("<Bq", _INT, value))
        else:
            parts.append(struct.pack("<BH", _BYTES, len(value)) + value)
    return b"".join(parts)


def unpacked(packed: bytes) -> list[Any]:
    """Decode the bytes of `packed`.

    Raises:
        struct.error, ValueError: They are malformed.
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


__all__ = ["CudaMemory", "packed", "unpacked"]
