"""A replica's link to the pool of its deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from actors.rpc.coordinator_client import CoordinatorClient
from cluster.topology import RoutingTable
from jobs.api.serving_metrics import ExpertFigures
from jobs.serving.versions import PoolMembership, ReplicaState, WantedVersions

_RETRY_SECONDS = 0.2


class PoolLink:
    """Asks and tells the pool; from one event loop.

    Args:
        pool: handle of its deployment.
        name: of the replica.
        interface: whether it is a process of the interface.

    Attributes:
        address: where the replica takes requests, which the pool hears with its standing.
    """

    def __init__(self, pool: DeploymentHandle, name: str, *, interface: bool = False) -> None:
        self.name = name
        self.address = ""
        self._interface = interface
        self._pool = pool
        self._calls: dict[str, Any] = {}

    async def enter(self) -> PoolMembership:
        """Become a member, or again after a crash of the pool: what to begin with."""
        member: PoolMembership = await self._pool.join.remote(self.name)
        if "lease" not in self._calls:
            self._calls["lease"] = self._pool.lease.remote(self.name)
        return member

    async def join(
        self, timeout: float
    ) -> tuple[PoolMembership, CoordinatorClient | None, RoutingTable | None]:
        """The same, with the coordinator, and its routing table of the same weights."""
        while True:
            member = await self.enter()
            if member.coordinator is None:
                return member, None, None
            client = CoordinatorClient(member.coordinator, timeout=timeout)
            try:
                table = await asyncio.to_thread(client.table)
            except BaseException:
                client.close()
                raise
            if table.weights == member.version.name:
                return member, client, table
            client.close()
            await asyncio.sleep(_RETRY_SECONDS)  # the weights are changing right now

    async def ask(self, known: int) -> WantedVersions:
        """See `Rollout.ask`."""
        question = self._calls["question"] = self._pool.ask.remote(self.name, known)
        wanted: WantedVersions = await question
        return wanted

    async def report(self, standing: ReplicaState) -> None:
        """See `Rollout.report`."""
        standing = replace(standing, address=self.address, interface=self._interface)
        await self._pool.report.remote(self.name, standing)

    async def trunks(self) -> Mapping[str, str]:
        """See `Rollout.trunks`."""
        trunks: Mapping[str, str] = await self._pool.trunks.remote()
        return trunks

    async def experts(self) -> ExpertFigures | None:
        """See `ExpertPool.experts`."""
        figures: ExpertFigures | None = await self._pool.experts.remote()
        return figures

    def close(self) -> None:
        """End the membership; the pool may end now."""
        self._pool.leave.remote(self.name)
        for call in self._calls.values():
            call.cancel()


__all__ = ["PoolLink"]
