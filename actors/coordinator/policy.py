"""What a coordinator is given: the weights that the job begins with, and the policy for its hosts."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import AutoscalingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """The weights that a job begins with.

    Attributes:
        name: Name of the weights; empty in training.
        directory: Where hosts read them; empty for what a training run begins with.
        moments: Whether the directory has the optimizer's moments too.
        step: In training, the optimizer step of the weights.
    """

    name: str = ""
    directory: str = ""
    moments: bool = False
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """Number of expert hosts of a job, and the thresholds for scaling, rebalancing and failure detection.

    Attributes:
        hosts: Number of hosts that the job begins with.
        dead_after: Seconds of silence after which a host is declared dead.
        autoscaling: When the number of hosts changes by load, in serving; None leaves it alone.
        rebalance_below: Balancedness below which experts are placed again by load; None never does.
        channel: How routers reach hosts, as in `cluster.channel`; only reported by the status.
    """

    hosts: int
    dead_after: float = 5.0
    autoscaling: AutoscalingSettings | None = None
    rebalance_below: float | None = None
    channel: str = "auto"


__all__ = ["HostPolicy", "InitialWeights"]
