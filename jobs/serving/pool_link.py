"""A replica's calls to the pool of its deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from jobs.api.serving_metrics import ExpertFigures
from jobs.serving.versions import PoolMembership, ReplicaState, WantedVersions


class PoolLink:
    """Calls the pool through Ray Serve; used in one event loop.

    Args:
        pool: Handle of the pool's deployment.
        name: Name of the replica.
        interface: Whether it is a process of the interface.

    Attributes:
        address: Address of the replica's gRPC service, which is part of its reports.
        serves: Whether the replica accepts requests, which is part of its reports.
    """

    def __init__(self, pool: DeploymentHandle, name: str, *, interface: bool = False) -> None:
        self.name = name
        self.address = ""
        self.serves = False
        self._interface = interface
        self._actor = ray.get_runtime_context().get_actor_id() or ""
        # Over Serve's gRPC: Ray's own answers of one process leave it in a single thread, so that one caller
        # that hangs would keep the pool's answers from all others.
        self._pool = pool.options(_by_reference=False)
        self._calls: dict[str, Any] = {}

    async def enter(self) -> PoolMembership:
        """Join the pool, also again after a crash of the pool."""
        member: PoolMembership = await self._pool.join.remote(
            self.name, self._actor, interface=self._interface
        )
        if "lease" not in self._calls:
            self._calls["lease"] = self._pool.lease.remote(self.name)
        return member

    async def ask(self, known: int) -> WantedVersions:
        """The versions that the pool wants, as `Rollout.ask` returns them."""
        question = self._calls["question"] = self._pool.ask.remote(self.name, known)
        wanted: WantedVersions = await question
        return wanted

    async def report(self, state: ReplicaState) -> None:
        """Report the replica's state, as for `Rollout.report`."""
        state = replace(state, address=self.address, interface=self._interface, serves=self.serves)
        await self._pool.report.remote(self.name, state)

    async def drained(self) -> None:
        """Report that this process of the interface has no request in progress and accepts none."""
        await self._pool.drained.remote(self.name)

    async def trunks(self) -> Mapping[str, str]:
        """Addresses of the trunk replicas by name."""
        trunks: Mapping[str, str] = await self._pool.trunks.remote()
        return trunks

    async def experts(self) -> ExpertFigures | None:
        """Figures of the expert hosts; None without hosts."""
        figures: ExpertFigures | None = await self._pool.experts.remote()
        return figures

    def close(self) -> None:
        """Leave the pool, which may end before this replica from now on."""
        self._pool.leave.remote(self.name)
        for call in self._calls.values():
            call.cancel()


__all__ = ["PoolLink"]
