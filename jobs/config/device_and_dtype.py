"""The device and the dtype that a process computes with."""

from __future__ import annotations

import torch

from errors import ConfigError, ResourceError
from jobs.config.run_config import RunConfig

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def compute_device(gpus: float, field: str) -> torch.device:
    """The device of this process: the GPU that Ray has reserved for it, or the CPU.

    Args:
        gpus: Number of reserved GPUs, 0 for none.
        field: The field of the configuration with this number, for the error.

    Raises:
        ResourceError: torch does not find the GPU.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "no CUDA in it" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        raise ResourceError(
            f"{field} asks for a GPU, and torch finds none (torch {torch.__version__} with {built}); install "
            "torch for CUDA and its driver there, or compute on CPUs"
        )
    return torch.device("cuda", 0)  # the first GPU that Ray makes visible to the process


def computes_bfloat16() -> bool:
    """Whether this machine's CPUs have units for products of bfloat16 matrices."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_dtype(name: str, *, on_gpus: bool) -> None:
    """Refuse bfloat16 on CPUs that emulate it, about a hundred times slower than float32.

    Args:
        on_gpus: Whether all workers and hosts compute on GPUs.

    Raises:
        ConfigError: `training.dtype` is bfloat16, and some process computes on CPUs without units for it.
    """
    if name == "bfloat16" and not on_gpus and not computes_bfloat16():
        raise ConfigError(
            "training.dtype: this machine's CPUs have no bfloat16 units and would emulate them, about a "
            "hundred times slower; use float32 (or auto), or compute on GPUs (training.gpus_per_worker and "
            "cluster.gpus_per_host)"
        )


def resolve_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of a run's computations, the same in every process."""
    auto = "bfloat16" if config.on_gpus else "float32"
    return _DTYPES[auto if config.training.dtype == "auto" else config.training.dtype]


def worker_device(config: RunConfig) -> torch.device:
    """The device of a worker that sees only its own GPU; for its own workers Ray Train chooses the device.

    Raises:
        ResourceError: There is no such device.
    """
    return compute_device(config.training.gpus_per_worker, "training.gpus_per_worker")


__all__ = ["check_dtype", "compute_device", "computes_bfloat16", "resolve_dtype", "worker_device"]
