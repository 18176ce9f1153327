"""The `cluster` section of a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ChannelKind = Literal["auto", "local", "shm", "grpc"]


class ClusterConfig(BaseModel):
    """How many expert hosts there are, what each gets, and how routers reach them.

    Attributes:
        expert_hosts: number of expert host actors; 0 keeps the experts in each worker's own process.
        channel: how a router reaches a host; `auto` picks by locality.
        threads_per_host: threads of a host's arithmetic; null shares out the machine's cores.
        cpus_per_host: CPUs that Ray reserves for each host.
        gpus_per_host: GPUs that Ray reserves for each host.
        call_timeout: seconds a router waits for one reply of a host.
        start_timeout: seconds the actors have to start and to load their weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert_hosts: int = Field(default=2, ge=0)
    channel: ChannelKind = "auto"
    threads_per_host: int | None = Field(default=None, ge=1)
    cpus_per_host: float = Field(default=0.5, ge=0)
    gpus_per_host: float = Field(default=0, ge=0)
    call_timeout: float = Field(default=120.0, gt=0)
    start_timeout: float = Field(default=180.0, gt=0)


__all__ = ["ChannelKind", "ClusterConfig"]
