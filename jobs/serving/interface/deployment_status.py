"""The status of trunk replicas and expert hosts, for `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from errors import ChannelError
from jobs.api.serving_metrics import EngineFigures, ExpertFigures
from jobs.serving.interface.replicas import Replicas
from protos.trunk_pb2 import TrunkStatus

_POOL_SECONDS = 2.0


class DeploymentStatus:
    """Asks all replicas and the pool for their status.

    Args:
        replicas: Connections to the replicas.
        where: Asks the pool for the replicas' addresses by name.
        hosts: Asks the pool for the expert hosts' figures.
    """

    def __init__(
        self,
        replicas: Replicas,
        where: Callable[[], Awaitable[Mapping[str, str]]],
        hosts: Callable[[], Awaitable[ExpertFigures | None]],
    ) -> None:
        self._replicas, self._where, self._hosts = replicas, where, hosts
        self._known: Mapping[str, str] = {}

    async def health(self) -> str | None:
        """Why requests cannot be answered, or None; the loss of a single replica is no such reason."""
        answers = await self._ask(health=True)
        for status in answers.values():
            if status.unwell:
                return status.unwell
        return None if answers else "no replica of the trunk answers"

    async def engines(self) -> Mapping[str, EngineFigures]:
        """Figures of all engines that answer, by the replica's name."""
        return {
            name.rpartition("#")[2]: EngineFigures(
                running=status.running,
                waiting=status.waiting,
                pages_held=status.pages_held,
                pages=status.pages,
                preemptions=status.preemptions,
                drafts=status.drafts,
                draft_tokens=status.draft_tokens,
                accepted_tokens=status.accepted_tokens,
                requests=status.requests,
            )
            for name, status in (await self._ask()).items()
        }

    async def experts(self) -> ExpertFigures | None:
        """Figures of the expert hosts; None without hosts, or if the pool does not answer."""
        with suppress(Exception):
            return await asyncio.wait_for(self._hosts(), _POOL_SECONDS)
        return None

    async def _ask(self, *, health: bool = False) -> dict[str, TrunkStatus]:
        with suppress(Exception):  # if the pool does not answer, the last addresses are used
            self._known = await asyncio.wait_for(self._where(), _POOL_SECONDS)

        async def one(address: str) -> TrunkStatus | None:
            try:
                return await self._replicas.status(address, health=health)
            except ChannelError:
                return None

        answers = await asyncio.gather(*map(one, self._known.values()))
        return {name: answer for name, answer in zip(self._known, answers, strict=True) if answer is not None}


__all__ = ["DeploymentStatus"]
