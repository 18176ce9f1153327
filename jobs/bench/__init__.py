"""`raymoe bench`: training steps beside transformers', and round trips over channels beside bare gRPC."""

from __future__ import annotations

from jobs.bench.channel import bench_channel
from jobs.bench.train import bench_train

__all__ = ["bench_channel", "bench_train"]
