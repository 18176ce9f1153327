"""Rotary position embedding (arXiv 2104.09864) with YaRN (arXiv 2309.00071), in DeepSeek-V3's form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from model.config import ModelConfig, YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Angles of T positions: cos and sin [T, R / 2] of the R rotary dimensions.

    Attributes:
        interleave: Pairs are (0, 1), (2, 3), … of the rotary dimensions; else (0, R/2), (1, R/2 + 1), …
    """

    cos: Tensor
    sin: Tensor
    interleave: bool

    def apply_(self, x: Tensor) -> None:
        """Rotate the rotary dimensions of x [B, T, heads, R] in place."""
        self._turn(x, self.sin)

    def undo_(self, x: Tensor) -> None:
        """Rotate x back in place: the transpose of `apply_`, for gradients."""
        self._turn(x, -self.sin)

    def _turn(self, x: Tensor, sin: Tensor) -> None:
        cos, sin = self.cos.unsqueeze(1), sin.unsqueeze(1)
        if self.interleave:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, dim=-1)
        turned = (a * cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a, sin)
        a.copy_(turned)


def rotation(config: ModelConfig, length: int, *, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Angles of positions 0 … length - 1, cached for the last few lengths."""
    return _rotation(
        config.qk_rope_head_dim,
        config.rope_theta,
        config.rope_scaling,
        config.rope_interleave,
        length,
        dtype,
        device,
    )


@lru_cache(maxsize=8)
def _rotation(
    size: int,
    theta: float,
    scaling: YarnScaling | None,
    interleave: bool,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequency, scale = _frequencies(size, theta, scaling, wide)
    # The cache may be filled in inference mode and read in training.
    with torch.inference_mode(False), torch.no_grad():
        angle = torch.arange(length, dtype=wide).unsqueeze(1) * frequency
        cos, sin = (angle.cos() * scale).to(device, dtype), (angle.sin() * scale).to(device, dtype)
    return Rotation(cos=cos, sin=sin, interleave=interleave)


def _frequencies(
    size: int, theta: float, scaling: YarnScaling | None, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Inverse wavelengths [size / 2], and the factor of cos and sin."""
    inverse = 1.0 / theta ** (torch.arange(0, size, 2, dtype=dtype) / size)
    if scaling is None:
        return inverse, 1.0
    span = scaling.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        """The dimension that makes so many rotations over the original context."""
        return size * math.log(span / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, size - 1)
    width = high - low if high != low else 0.001  # as in released code
    ramp = ((torch.arange(size // 2, dtype=dtype) - low) / width).clamp(0, 1)
    mixed = inverse / scaling.factor * ramp + inverse * (1 - ramp)
    if scaling.attention_factor is not None:
        scale = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        scale = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
    else:
        scale = mscale(scaling.factor, 1.0)
    return mixed, scale


def mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature 0.1 · weight · ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_scale(config: ModelConfig) -> float:
    """Scale of the logits of attention: 1 / sqrt(d_h + d_h^R) of eq. 10, times YaRN's factor."""
    scale: float = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


__all__ = ["Rotation", "attention_scale", "mscale", "rotation"]
