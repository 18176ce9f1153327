"""Times the arithmetic of an expert host against dense matrix products of the same device and type."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import finished, machine
from errors import ConfigError
from jobs.config.device_and_dtype import compute_device
from model.experts.grouped_swiglu import ExpertShard, experts_backward, experts_forward

_ROWS = {"cpu": 256, "cuda": 4096}
_PRODUCTS = 3  # matrices of an expert


def bench_experts(
    *, device: str, hidden: int, width: int, experts: int, rows: int | None, rounds: int
) -> dict[str, Any]:
    """Time the forward and backward pass of a layer's experts, with the same number of rows for each.

    The time includes gathering rows, SwiGLU, gates and sums; the operations counted are matrix products only:
    6·D·I per row forward, twice that backward.

    Args:
        device: cpu, in float32, or cuda, in bfloat16.
        hidden, width: D and I of the experts.
        experts: Number of experts.
        rows: Rows of each expert; None takes as many as the device needs for its best speed.
        rounds: Number of rounds, in which the computations alternate.

    Returns:
        `forward_over_dense`, `backward_over_dense` and `both_over_dense`, medians of the rounds' ratios of
        rates; `dense_tflops`; `spreads`.

    Raises:
        ConfigError: The device is unknown.
        ResourceError: There is no such device.
    """
    if device not in _ROWS:
        raise ConfigError(f"--device {device!r} should be one of {', '.join(_ROWS)}")
    place = compute_device(float(device == "cuda"), "--device cuda")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    each = rows or _ROWS[device]
    torch.manual_seed(0)
    shard = _random_shard(experts, hidden, width, device=place, dtype=dtype)
    rates = _rates(_computations(shard, each), _flops(shard, each), rounds, place)
    dense_rates = rates.pop("dense")
    ratios = {
        f"{name}_over_dense": [a / b for a, b in zip(values, dense_rates, strict=True)]
        for name, values in rates.items()
    }
    return {
        **{name: statistics.median(values) for name, values in ratios.items()},
        "dense_tflops": statistics.median(dense_rates) / 1e12,
        "spreads": {name: [min(values), max(values)] for name, values in ratios.items()},
        "shape": f"{experts} experts of {hidden} x {width}, {each} rows each, {dtype}",
        "rounds": rounds,
        "machine": machine(place),
    }


def _random_shard(
    experts: int, hidden: int, width: int, *, device: torch.device, dtype: torch.dtype
) -> ExpertShard:
    """Experts with random weights and zero gradients."""
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    return ExpertShard(
        torch.randn(experts, 2 * width, hidden, **made) / hidden**0.5,
        torch.randn(experts, hidden, width, **made) / width**0.5,
        torch.zeros(experts, 2 * width, hidden, device=device),
        torch.zeros(experts, hidden, width, device=device),
    )


def _flops(shard: ExpertShard, rows: int) -> float:
    """Operations of a forward pass with `rows` rows for each expert."""
    return 2.0 * rows * (shard.w13.numel() + shard.w2.numel())


def _computations(shard: ExpertShard, rows: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """The timed computations by name, each with the number of its operations.

    Args:
        rows: Number of rows for each expert.
    """
    experts, width, hidden = shard.w13.shape[0], shard.w13.shape[1] // 2, shard.w13.shape[2]
    n = rows * experts
    flops = _flops(shard, rows)
    made: dict[str, Any] = {"device": shard.w13.device, "dtype": shard.w13.dtype}
    x, gate = torch.randn(n, hidden, **made), torch.rand(n, **made)
    expert = torch.arange(experts, dtype=torch.int32).repeat(rows)
    row_ptr = torch.arange(n + 1, dtype=torch.int32)
    dense = shard.w13.flatten(0, 1)[: 2 * width].t()

    def product() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(x, dense)

    def forward() -> Any:
        return experts_forward(shard, x, row_ptr, expert, gate, keep=True)

    partial, saved = forward()
    assert saved is not None
    return {
        "dense": (product, 2 * flops),  # of each product 2·n·D·2I
        "forward": (forward, flops),
        "backward": (lambda: experts_backward(shard, saved, partial), 2 * flops),
    }


def _rates(
    works: dict[str, tuple[Callable[[], Any], float]], flops: float, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Operations per second of each computation, and of forward and backward together, in each round."""
    rates: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, (work, arithmetic) in works.items():
            seconds[name] = _timed(work, device)
            rates.setdefault(name, []).append(arithmetic / seconds[name])
        both = 3 * flops / (seconds["forward"] + seconds["backward"])
        rates.setdefault("both", []).append(both)
    return {name: values[1:] for name, values in rates.items()}  # the first round warms up


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    finished(device)
    began = time.perf_counter()
    work()
    finished(device)
    return time.perf_counter() - began


__all__ = ["bench_experts"]
