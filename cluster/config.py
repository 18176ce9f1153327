"""The `cluster` section of a run's configuration."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_FINEST = 4  # decimals of an amount that Ray can reserve

ChannelKind = Literal["auto", "local", "shm", "collective", "grpc"]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Delay = Annotated[float, Field(ge=0, le=86400)]


def _reservable(value: float) -> float:
    if round(value, _FINEST) != value:
        raise ValueError(f"Ray reserves no finer shares than {10**-_FINEST:.{_FINEST}f}; round it")
    return value


Reserved = Annotated[float, Field(ge=0, le=65536), AfterValidator(_reservable)]
GpuShare = Annotated[float, Field(ge=0, le=1), AfterValidator(_reservable)]
Amount = Annotated[float, Field(gt=0, le=65536), AfterValidator(_reservable)]


class AutoscalingSettings(BaseModel):
    """When expert hosts are added and retired by load.

    Attributes:
        min_hosts: least number of hosts.
        max_hosts: largest number of hosts.
        target_utilization: share of the time that hosts should be busy, on average.
        target_waiting: rows that may wait or be in flight at each host, on average, before hosts are added;
            null uses utilisation alone.
        tolerance: deviation of the load from its target, as a share of the target, that changes nothing.
        upscale_delay: seconds for which the load must have been too high.
        downscale_delay: seconds for which the load must have been too low.
        cooldown: seconds between two changes of the number of hosts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    min_hosts: int = Field(default=1, ge=1, le=(1 << 31) - 1)
    max_hosts: int = Field(default=4, ge=1, le=(1 << 31) - 1)
    target_utilization: float = Field(default=0.6, gt=0, le=1)
    target_waiting: float | None = Field(default=None, gt=0)
    tolerance: float = Field(default=0.1, ge=0, lt=1)
    upscale_delay: Delay = 5.0
    downscale_delay: Delay = 60.0
    cooldown: Delay = 10.0

    @field_validator("max_hosts")
    @classmethod
    def _not_below_the_minimum(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_hosts", 1)
        if value < least:
            raise ValueError(f"should be at least min_hosts ({least})")
        return value

    @field_validator("tolerance")
    @classmethod
    def _reachable(cls, value: float, info: ValidationInfo) -> float:
        # Utilisation never exceeds 1: beyond that the load would never count as too high.
        target = info.data.get("target_utilization", 1.0)
        if target * (1 + value) >= 1:
            raise ValueError(
                f"leaves no utilisation that is too high: target_utilization ({target}) x "
                f"(1 + tolerance) should be below 1"
            )
        return value


class ClusterConfig(BaseModel):
    """Number of expert hosts, what each gets, and how routers reach them.

    Attributes:
        expert_hosts: number of expert host actors; 0 keeps the experts in each worker's own process.
        hosts_per_node: expert hosts for each node of the Ray cluster that has CPUs for one, as nodes join
            and leave; null keeps to `expert_hosts`.
        interface: address that hosts, coordinator and trunks listen on; null is the node's own address with
            TLS, else the loopback; `node` is the node's own address even without TLS.
        channel: how a router reaches a host; `auto` picks by locality. On GPUs shm keeps rows in the GPU's
            memory where router and host share a GPU, and collective is NCCL where they have one each; neither
            gloo nor NCCL is encrypted, so neither is used with TLS.
        threads_per_host: threads of a host's arithmetic; null divides the machine's cores among the hosts.
        cpus_per_host: CPUs that Ray reserves for each host.
        gpus_per_host: GPU that Ray reserves for each host, which then computes on it; a fraction shares a GPU
            with others, 0 computes on CPUs.
        host_resources: custom Ray resources that each host requests, with their amounts; hosts run only on
            nodes that offer them, and Ray's autoscaler adds such nodes.
        call_timeout: seconds that a router waits for one reply of a host.
        start_timeout: seconds that the actors have to start and to load their weights.
        replicas: least number of hosts that hold each expert, as far as there are that many hosts.
        redundant_experts: further replicas in each layer, for the experts with the highest load.
        dead_after: seconds of silence after which a host, or a replica of the trunk, is declared dead.
        hedge_after: seconds that inference waits for one host before it uses other replicas; null waits as
            long as the host lives.
        rebalance_below: balancedness (mean over highest load of the hosts) below which experts are placed
            again by load, in training between two steps; null never does.
        snapshot_interval: training steps between snapshots in the memory of other hosts; 0 takes none.
        autoscaling: when serving adds and retires expert hosts by load; null leaves their number alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    expert_hosts: int = Field(default=2, ge=0, le=(1 << 31) - 1)
    hosts_per_node: int | None = Field(default=None, ge=1, le=1024)
    interface: str | None = None
    channel: ChannelKind = "auto"
    threads_per_host: int | None = Field(default=None, ge=1, le=1024)
    cpus_per_host: Reserved = 0.5
    gpus_per_host: GpuShare = 0
    host_resources: dict[str, Amount] = Field(default_factory=dict)
    call_timeout: Seconds = 120.0
    start_timeout: Seconds = 180.0
    replicas: int = Field(default=1, ge=1, le=1024)
    redundant_experts: int = Field(default=0, ge=0, le=(1 << 20))
    dead_after: Seconds = 5.0
    hedge_after: Seconds | None = None
    rebalance_below: float | None = Field(default=None, gt=0, le=1)
    snapshot_interval: int = Field(default=10, ge=0, le=(1 << 31) - 1)
    autoscaling: AutoscalingSettings | None = None

    @field_validator("interface")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None and value not in ("node", "localhost"):
            try:
                ipaddress.ip_address(value.removeprefix("[").removesuffix("]"))
            except ValueError:
                raise ValueError(
                    f"{value!r} is no address; give an IP address, node (each node's own address), or null"
                ) from None
        return value

    @field_validator("host_resources")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        own = sorted(name for name in value if not name or name.lower() in ("cpu", "gpu", "memory"))
        if own:
            raise ValueError(
                f"{', '.join(map(repr, own))} is no custom resource; CPUs are cluster.cpus_per_host's matter"
            )
        odd = sorted(name for name, amount in value.items() if amount > 1 and amount % 1)
        if odd:
            raise ValueError(f"Ray shares out {', '.join(odd)} whole above 1; give a whole number")
        return value


__all__ = ["AutoscalingSettings", "ChannelKind", "ClusterConfig", "Reserved", "Seconds"]
