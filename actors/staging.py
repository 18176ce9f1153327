"""Where the trunk is on a GPU and its lanes take tensors of the CPU: rows go out, and sums come back.

A token's row crosses to the CPU once, however many hosts it goes to, and the hosts' sum comes back as one.
Copies go through pinned memory, so that the CPU waits once for each call, when the route has to be known,
and the GPU goes on with whatever has been queued meanwhile: the shared expert.

Shapes: N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from model.experts import Experts, PairedExperts, Pending


class StagedExperts:
    """Implements `model.experts.Experts` for tensors of a GPU over experts that take those of the CPU."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    def dispatch(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor) -> Pending:
        """See `model.experts.Experts.dispatch`."""
        here_rows, here_gates, here_idx = cast(
            "tuple[Tensor, Tensor, Tensor]",
            _ToCpu.apply(rows, gates, idx),  # type: ignore[no-untyped-call]
        )
        pending = self._experts.dispatch(layer, here_rows, here_idx, here_gates)
        return _StagedPending(pending, rows.device)


class StagedPair(StagedExperts):
    """Implements `model.experts.PairedExperts`, too."""

    def __init__(self, experts: PairedExperts) -> None:
        first, second = experts.pair
        super().__init__(first)
        self.pair: tuple[Experts, Experts] = (StagedExperts(first), StagedExperts(second))


@dataclass(frozen=True, slots=True)
class _StagedPending:
    pending: Pending
    device: torch.device

    def combine(self) -> Tensor:
        out: Tensor = _ToDevice.apply(self.pending.combine(), self.device)  # type: ignore[no-untyped-call]
        return out


def staged(experts: Experts, device: torch.device) -> Experts:
    """Experts for a trunk on this device."""
    if device.type == "cpu":
        return experts
    return StagedPair(experts) if isinstance(experts, PairedExperts) else StagedExperts(experts)


def to_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies in the CPU's memory, all of which are there when this returns; waited for once."""
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    here = tuple(map(_begin_copy, tensors))
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return here


def _begin_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return _memory(tensor, tensor.device).copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, which is there for whatever is queued after it; the CPU goes on."""
    if tensor.device == device:
        return tensor
    pinned = tensor if tensor.is_pinned() else _memory(tensor, device).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def _memory(like: Tensor, device: torch.device) -> Tensor:
    """The CPU's, which a GPU reads and writes without help."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


class _ToCpu(torch.autograd.Function):
    """Rows and gates with their gradients' way back; indices have none."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, idx: Tensor) -> tuple[Tensor, ...]:
        ctx.device = rows.device
        here = to_cpu(rows.detach(), gates.detach(), idx)
        ctx.mark_non_differentiable(here[2])
        return here

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_gates: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return to_device(d_rows, ctx.device), to_device(d_gates, ctx.device), None


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, device: torch.device) -> Tensor:
        return to_device(out.detach(), device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (here,) = to_cpu(d_out)
        return here, None


__all__ = ["StagedExperts", "StagedPair", "staged", "to_cpu", "to_device"]
