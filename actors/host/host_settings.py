"""Values that an expert host is built from: its settings, its initial experts, its resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from actors.host.checkpoint_part import MomentSource
from actors.messages.steps import OptimizerSettings
from actors.messages.transfer_orders import Peer
from actors.rpc.host_client import HostClient
from cluster.topology import HostInfo
from model.weight_source import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """How an expert host computes.

    Attributes:
        optimizer: Settings of AdamW; None for a host that only infers.
        dtype: Type of rows and replies, and of the weights used in computation.
        threads: Torch's number of threads in this process; None leaves it unchanged.
        device: Where the weights live.
        commit_timeout: Seconds that a request of the next step waits for a commit under way.
    """

    optimizer: OptimizerSettings | None = None
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    device: torch.device | str = "cpu"
    commit_timeout: float = 120.0

    @property
    def trains(self) -> bool:
        """Whether the host keeps gradients and moments and applies optimizer steps."""
        return self.optimizer is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialExperts:
    """The experts that a host starts with.

    Attributes:
        source: Where their weights come from.
        experts: Model layer index -> ids of the experts; may be empty.
        moments: Where the optimizer's moments come from; None starts with zeros.
        epoch: Placement epoch.
        step: Number of optimizer steps already applied to the weights.
    """

    source: WeightSource
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    moments: MomentSource | None = None
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResources:
    """What an expert host uses beyond its own state when it assembles the experts of a new epoch.

    Attributes:
        open_source: Opens the weights of a checkpoint directory; None refuses directories.
        open_moments: Opens the optimizer moments of a checkpoint directory; None refuses them.
        require_room: Called with the number of bytes that an assembly needs; raises when there is too little
            memory.
        connect: Opens a connection to another expert host.
    """

    open_source: Callable[[str], WeightSource] | None = None
    open_moments: Callable[[str], MomentSource] | None = None
    require_room: Callable[[int], None] | None = None
    connect: Callable[[HostInfo], Peer] = HostClient


__all__ = ["HostResources", "HostSettings", "InitialExperts"]
