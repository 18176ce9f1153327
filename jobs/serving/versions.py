"""Versions of a deployment's weights, and the messages about them between the pool and the replicas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """Weights that a deployment can use.

    Attributes:
        epoch: Placement epoch at the expert hosts; without hosts, an increasing number.
        directory: The directory with the weights.
        name: The name in the `system_fingerprint` of answers.
    """

    epoch: int
    directory: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedVersions:
    """The versions that replicas should use and load.

    Attributes:
        run: The run of the pool.
        serial: Increases with every change.
        use: The version to compute with.
        prepare: A version to load beside it.
        closing: Whether the deployment shuts down, and the interface refuses requests.
    """

    run: str
    serial: int
    use: WeightsVersion
    prepare: WeightsVersion | None = None
    closing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """State of a replica, which it reports to the pool.

    Attributes:
        uses: Epoch of the version that its next step uses.
        ready: Epoch of the version that it has loaded beside it.
        failed: Epoch of a version that it failed to load.
        failure: Text of that error.
        address: Address of its gRPC service; empty before it has one.
        interface: Whether it is a process of the interface, not a trunk replica.
        serves: Whether it accepts requests.
    """

    uses: int
    ready: int | None = None
    failed: int | None = None
    failure: str = ""
    address: str = ""
    interface: bool = False
    serves: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMembership:
    """The pool's answer to a replica that joins.

    Attributes:
        run: Name of the deployment in requests to expert hosts.
        coordinator: Address of the coordinator; None if the experts are in the replica.
        version: The version of the weights to start with.
    """

    run: str
    coordinator: str | None
    version: WeightsVersion


__all__ = ["PoolMembership", "ReplicaState", "WantedVersions", "WeightsVersion"]
