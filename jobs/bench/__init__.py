"""Benchmarks of training, decoding and channels, as ratios against a peer or a limit."""

from __future__ import annotations

from jobs.bench.channel import bench_channel
from jobs.bench.decode import bench_decode
from jobs.bench.train import bench_train

__all__ = ["bench_channel", "bench_decode", "bench_train"]
