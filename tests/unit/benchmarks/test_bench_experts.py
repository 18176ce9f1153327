"""`raymoe bench experts`, and benchmarks on a device that this machine lacks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode import bench_decode
from benchmarks.experts import bench_experts
from benchmarks.train import bench_train
from errors import ConfigError, ResourceError
from jobs.config.device_and_dtype import compute_device
from jobs.config.presets import preset


def test_experts_against_dense_products() -> None:
    found = bench_experts(device="cpu", hidden=64, width=32, experts=4, rows=32, rounds=2)
    for name in ("forward", "backward", "both"):
        low, high = found["spreads"][f"{name}_over_dense"]
        assert 0 < low <= found[f"{name}_over_dense"] <= high
    assert found["dense_tflops"] > 0
    assert found["shape"] == "4 experts of 64 x 32, 32 rows each, torch.float32"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tpu' should be"):
        bench_experts(device="tpu", hidden=64, width=32, experts=4, rows=32, rounds=1)
    with pytest.raises(ConfigError, match="'tpu' should be cpu or cuda"):
        bench_train(preset("tiny"), steps=1, device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line() -> None:
    for run in (
        lambda: bench_experts(device="cuda", hidden=64, width=32, experts=4, rows=32, rounds=1),
        lambda: bench_train(preset("tiny"), steps=1, device="cuda"),
        lambda: bench_decode(preset("tiny"), rounds=1, device="cuda"),
    ):
        with pytest.raises(
            ResourceError, match=r"--device cuda asks for a GPU, and torch finds none .*; install"
        ):
            run()
    with pytest.raises(ResourceError, match=r"cluster\.gpus_per_host asks"):
        compute_device(0.5, "cluster.gpus_per_host")
    assert compute_device(0, "cluster.gpus_per_host") == torch.device("cpu")
