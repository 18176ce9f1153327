"""The `cluster` section of a run's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ChannelKind = Literal["auto", "local", "shm", "grpc"]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Reserved = Annotated[float, Field(ge=0, le=65536)]


class ClusterConfig(BaseModel):
    """How many expert hosts there are, what each gets, and how routers reach them.

    Attributes:
        expert_hosts: number of expert host actors; 0 keeps the experts in each worker's own process.
        interface: address that hosts and coordinator listen on; null is the loopback for a cluster of the
            command's own, else the address that Ray knows a node by.
        channel: how a router reaches a host; `auto` picks by locality.
        threads_per_host: threads of a host's arithmetic; null shares out the machine's cores.
        cpus_per_host: CPUs that Ray reserves for each host.
        gpus_per_host: GPUs that Ray reserves for each host; 0 so far, as hosts compute on CPUs.
        call_timeout: seconds a router waits for one reply of a host.
        dead_after: seconds without an answer after which a process counts as dead.
        start_timeout: seconds the actors have to start and to load their weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    expert_hosts: int = Field(default=2, ge=0, le=(1 << 31) - 1)
    interface: str | None = None
    channel: ChannelKind = "auto"
    threads_per_host: int | None = Field(default=None, ge=1, le=1024)
    cpus_per_host: Reserved = 0.5
    gpus_per_host: Reserved = 0
    call_timeout: Seconds = 120.0
    dead_after: Seconds = 5.0
    start_timeout: Seconds = 180.0

    @field_validator("gpus_per_host")
    @classmethod
    def _no_idle_gpu(cls, value: float) -> float:
        if value:
            raise ValueError("expert hosts compute on CPUs, and would leave a GPU idle; set it to 0")
        return value


__all__ = ["ChannelKind", "ClusterConfig", "Reserved", "Seconds"]
