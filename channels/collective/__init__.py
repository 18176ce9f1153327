"""The channels over process groups of torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations
