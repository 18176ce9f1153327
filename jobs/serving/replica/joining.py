"""A trunk replica joins the pool of its deployment."""

from __future__ import annotations

import asyncio

from actors.rpc.coordinator_client import CoordinatorClient
from cluster.topology import RoutingTable
from jobs.serving.pool_link import PoolLink
from jobs.serving.versions import PoolMembership

_RETRY_SECONDS = 0.2


async def join(
    link: PoolLink, timeout: float
) -> tuple[PoolMembership, CoordinatorClient | None, RoutingTable | None]:
    """Join the pool; also return the coordinator and its routing table for the same weights.

    Both are None if there are no expert hosts.

    Args:
        link: The calls to the pool.
        timeout: Seconds for one call of the coordinator.
    """
    while True:
        member = await link.enter()
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
        await asyncio.sleep(_RETRY_SECONDS)  # a change of the weights is in progress


__all__ = ["join"]
