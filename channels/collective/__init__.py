"""The channels of torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations
