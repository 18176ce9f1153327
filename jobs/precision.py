"""Which arithmetic this machine is good at."""

from __future__ import annotations

import torch

from errors import ConfigError


def computes_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware: a GPU, or a CPU with units for it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_dtype(name: str) -> None:
    """Refuse what would run, but about a hundred times slower than float32.

    Raises:
        ConfigError: `training.dtype` is bfloat16 on a machine without units for it.
    """
    if name == "bfloat16" and not computes_bfloat16():
        raise ConfigError(
            "training.dtype: this machine has no bfloat16 units and would emulate them, about a hundred "
            "times slower; use float32 (or auto)"
        )


__all__ = ["check_dtype", "computes_bfloat16"]
