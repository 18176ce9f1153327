"""Weights in 8-bit floats with one scale per block, as DeepSeek-V3 is released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errors import CheckpointError, brief

SCALE_SUFFIX = "_scale_inv"
"""Suffix that makes a weight's name the name of its scales."""

_BLOCK = (128, 128)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are 8-bit floats, which have scales beside them."""
    return dtype in _FP8


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from `quantization_config` of a config.json.

    Raises:
        CheckpointError: The checkpoint is quantised in another way.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return _BLOCK
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config is {brief(quantization)}, which is no mapping; leave it out, "
            "or give another export of the model"
        )
    method = quantization.get("quant_method")
    size = quantization.get("weight_block_size", _BLOCK)
    sizes = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if method != "fp8" or not sizes:
        raise CheckpointError(
            f"config.json: quantization_config has quant_method {brief(method)} and weight_block_size "
            f"{brief(size)}; only fp8 with blocks of two sizes can be read: give another export of the model"
        )
    return size[0], size[1]


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of weight [R, C] by its scale [⌈R / block⌉, ⌈C / block⌉]: [R, C] float32."""
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(block[0], 0)[:rows]
    return weight.float().mul_(spread.repeat_interleave(block[1], 1)[:, :columns])


def quantize(weight: Tensor, block: tuple[int, int] = _BLOCK) -> tuple[Tensor, Tensor]:
    """Round weights to float8_e4m3fn [R, C] with float32 scales, so that a block's largest value is fp8's."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = weight.new_zeros(down * block[0], across * block[1], dtype=torch.float32)
    padded[:rows, :columns] = weight
    largest = padded.view(down, block[0], across, block[1]).abs().amax((1, 3))
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min_(torch.finfo(torch.float32).tiny)
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (padded / spread)[:rows, :columns].to(torch.float8_e4m3fn), scale


__all__ = ["SCALE_SUFFIX", "block_size", "dequantize", "is_fp8", "quantize"]
