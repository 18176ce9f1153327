"""The expert host: a shard of the routed experts of all MoE layers."""

from __future__ import annotations
