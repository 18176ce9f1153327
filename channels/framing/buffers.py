"""Tensors as bytes, and bytes as tensors: views without copies, of memory that other objects own."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from channels.framing.header import TensorSpan

_NUMPY_DTYPE: Final[dict[torch.dtype, np.dtype[Any]]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(np.int16),  # numpy has none
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}

COPIED_BELOW: Final = 1 << 14
"""Bytes below which a tensor is copied rather than viewed: a view costs more than so short a copy."""


def buffer_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes of a tensor as an object with the buffer protocol; without a copy if it is contiguous."""
    flat = plain(tensor)
    if flat.dtype is torch.bfloat16:  # numpy has none
        flat = flat.view(torch.int16)
    return flat.numpy()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous and without autograd history; itself if it is so already."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class OwnedBuffer:
    """Memory for numpy to make views of; keeps its owner alive.

    Writable even if a bytes object owns it: a frame belongs to its decoder alone, so that its tensors may be
    changed (torch would warn of a read-only buffer).
    """

    __slots__ = ("__array_interface__", "_owner")

    def __init__(self, owner: object, address: int, size: int) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
        }


def address_of(memory: np.ndarray[Any, Any]) -> int:
    """The address of an array's first byte."""
    return int(memory.__array_interface__["data"][0])


def tensor_at(memory: np.ndarray[Any, Any], address: int, where: TensorSpan) -> torch.Tensor:
    """The tensor at a span of `memory` (uint8, writable, beginning at `address`): a view if it is aligned."""
    dtype, shape, count, offset, end = where
    if not count:
        return torch.empty(shape, dtype=dtype)
    if (address + offset) % dtype.itemsize:
        memory, offset = memory[offset:end].copy(), 0
    # With numpy, which takes the shape at once: a third of the time of torch.frombuffer and a view, and
    # without releasing the interpreter's lock, which a thread may have to wait for afterwards.
    tensor = torch.from_numpy(np.ndarray(shape, _NUMPY_DTYPE[dtype], memory, offset))
    return tensor.view(dtype) if dtype is torch.bfloat16 else tensor


__all__ = ["COPIED_BELOW", "OwnedBuffer", "address_of", "buffer_of", "plain", "tensor_at"]
