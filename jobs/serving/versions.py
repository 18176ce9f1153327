"""Versions of a deployment's weights, and what the pool and the replicas tell each other about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """Weights that a deployment can use.

    Attributes:
        epoch: of the expert hosts' routing table; without hosts a number that grows.
        directory: that holds them.
        name: what answers carry as `system_fingerprint`.
    """

    epoch: int
    directory: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedVersions:
    """What replicas are to do.

    Attributes:
        run: of the pool that says so.
        serial: grows with every change.
        use: the version to compute with.
        prepare: one to get ready beside it.
    """

    run: str
    serial: int
    use: WeightsVersion
    prepare: WeightsVersion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """How a replica stands.

    Attributes:
        uses: epoch of the version that its next step is computed with.
        ready: epoch of the one that it holds beside it.
        failed: epoch of one that it could not get ready.
        failure: why.
        address: where it takes requests; empty until it does.
        interface: it is no replica of the trunk, but a process of the interface.
    """

    uses: int
    ready: int | None = None
    failed: int | None = None
    failure: str = ""
    address: str = ""
    interface: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMembership:
    """What a replica begins with.

    Attributes:
        run: the deployment's name for requests to hosts.
        coordinator: its address; None keeps the experts in the replica.
        version: of the weights.
    """

    run: str
    coordinator: str | None
    version: WeightsVersion


__all__ = ["PoolMembership", "ReplicaState", "WantedVersions", "WeightsVersion"]
