"""Copies of tensors between a GPU and the CPU's memory, through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor


def to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors into the CPU's memory, waiting once until all copies are complete."""
    if all(tensor.is_cpu for tensor in tensors):
        return tensors
    here = tuple(map(_begin_copy, tensors))
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return here


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting; work that is queued later on the device sees the copy."""
    if tensor.device == device:
        return tensor
    pinned = tensor if tensor.is_pinned() else _memory(tensor, device).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def _begin_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return _memory(tensor, tensor.device).copy_(tensor, non_blocking=True)


def _memory(like: Tensor, device: torch.device) -> Tensor:
    """Memory of the CPU: pinned for a GPU, which can then copy asynchronously."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


__all__ = ["to_cpu", "to_device"]
