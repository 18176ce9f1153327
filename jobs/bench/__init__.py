"""Benchmarks of training, decoding, experts, serving and channels."""

from __future__ import annotations

from jobs.bench.channel import bench_channel
from jobs.bench.decode import bench_decode
from jobs.bench.drafts import bench_drafts
from jobs.bench.experts import bench_experts
from jobs.bench.overlap import bench_overlap
from jobs.bench.serve import bench_serve
from jobs.bench.train import bench_train

__all__ = [
    "bench_channel",
    "bench_decode",
    "bench_drafts",
    "bench_experts",
    "bench_overlap",
    "bench_serve",
    "bench_train",
]
