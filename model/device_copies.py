"""Tensors between a GPU and the CPU's memory, through pinned memory: whoever can goes on meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


def to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies in the CPU's memory, all of which are there when this returns; waited for once."""
    if all(tensor.is_cpu for tensor in tensors):
        return tensors
    here = tuple(map(_begin_copy, tensors))
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return here


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, which is there for whatever is queued after it; the CPU goes on."""
    if tensor.device == device:
        return tensor
    pinned = tensor if tensor.is_pinned() else _memory(tensor, device).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def _begin_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return _memory(tensor, tensor.device).copy_(tensor, non_blocking=True)


def _memory(like: Tensor, device: torch.device) -> Tensor:
    """The CPU's, which a GPU reads and writes without help."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


__all__ = ["to_cpu", "to_device"]
