"""Root-mean-square normalisation (arXiv 1910.07467), with a backward pass of few sweeps over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNormFunction(torch.autograd.Function):
    """y = x / rms(x) * weight; keeps x and one number per row instead of the normalised rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widen(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # Rounded before the weight is applied, as in released code; nothing is rounded at float32 and above.
        y: Tensor = (wide * scale).to(x.dtype).mul_(weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        hat = _widen(x) * scale
        d_y = _widen(d_y)
        d_weight = torch.linalg.vecdot(d_y.flatten(0, -2), hat.flatten(0, -2), dim=0)
        d_hat = d_y * weight
        mean = torch.linalg.vecdot(d_hat, hat).unsqueeze(-1).div_(x.shape[-1])
        d_x = torch.addcmul(d_hat, hat, mean, value=-1, out=d_hat).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


def _widen(x: Tensor) -> Tensor:
    """Convert 16-bit types to float32; others keep their type."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; `weight` [size] starts at one."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., size] to the same shape."""
        out: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


__all__ = ["RMSNorm"]
