"""What routers send to an expert host, checked, and copied where they could still write to it."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.host.expert_layers import Layer
from channels.base import Request
from errors import ProtocolError
from kernels.dispatch import FOREIGN, MALFORMED, localize
from model.device_copies import to_device


def payload(request: Request, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """The request's tensors: numbers on the host's device, indices for the CPU, which looks at them.

    Raises:
        ProtocolError: they are not `n`.
    """
    if len(request.tensors) != n:
        raise ProtocolError(f"{request.id.phase.name} carries {len(request.tensors)} tensors instead of {n}")
    if device.type == "cpu":
        return request.tensors
    return tuple(
        to_device(tensor, device) if tensor.is_floating_point() else tensor for tensor in request.tensors
    )


def local_experts(host: str, layer: Layer, request: Request) -> tuple[Tensor, Tensor]:
    """row_ptr [n + 1], and the request's experts as indices into the shard [nnz]; both int32, on the CPU.

    Raises:
        ProtocolError: they do not go together, or name an expert that is not here.
    """
    rows, row_ptr, expert, gate = request.tensors
    row_ptr = row_ptr.clone()
    whole = row_ptr.numel() == rows.shape[0] + 1 and expert.numel() == gate.numel()
    flat = row_ptr.ndim == expert.ndim == gate.ndim == 1
    integers = row_ptr.dtype == expert.dtype == torch.int32
    local = torch.empty_like(expert)
    found = MALFORMED
    if whole and flat and integers:
        found = localize(row_ptr.numpy(), expert.numpy(), layer.local_of, local.numpy())
    if found == MALFORMED:
        raise ProtocolError(
            f"{rows.shape[0]} rows came with row_ptr {list(row_ptr.shape)} up to "
            f"{row_ptr.flatten()[-1:].tolist()}, experts {list(expert.shape)} and gates "
            f"{list(gate.shape)}; row_ptr rises from 0 to the number of pairs"
        )
    if found == FOREIGN:
        here = set(layer.experts)
        foreign = sorted(set(expert.tolist()) - here)[:8]
        raise ProtocolError(
            f"expert host {host} does not hold experts {foreign} of layer {request.id.layer}; it "
            f"holds {len(here)}: {sorted(here)[:8]}…"
        )
    return row_ptr, local


__all__ = ["local_experts", "payload"]
