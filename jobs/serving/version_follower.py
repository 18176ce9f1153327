"""Keeps a replica at the weights version that the pool wants: asks for it, changes to it, and reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from errors import RaymoeError
from jobs.serving.versions import ReplicaState, WantedVersions, WeightsVersion

_RETRY_SECONDS = 1.0


class Exchanger(Protocol):
    """Uses one version of the weights, and can load another one beside it."""

    async def prepare(self, version: WeightsVersion) -> None:
        """Load a version beside the one in use."""
        ...

    async def exchange(self, version: WeightsVersion) -> None:
        """Use the prepared version from the next step on."""
        ...

    def forget(self) -> None:
        """Drop the prepared version."""
        ...


class Follower:
    """Keeps a replica at the version that the pool wants.

    Args:
        run: The run of the pool that the replica has joined.
        version: The version that the replica starts with.
        ask: Calls `Rollout.ask` of the pool for this replica, with the last known serial.
        report: Calls `Rollout.report` of the pool for this replica.

    Attributes:
        orphaned: Whether the pool that the replica has joined is gone.
    """

    def __init__(
        self,
        run: str,
        version: WeightsVersion,
        *,
        ask: Callable[[int], Awaitable[WantedVersions]],
        report: Callable[[ReplicaState], Awaitable[None]],
    ) -> None:
        self._run = run
        self._uses = version
        self._ready: WeightsVersion | None = None
        self._ask, self._report = ask, report
        self._wanted: WantedVersions | None = None
        self._news = asyncio.Event()
        self.orphaned = False

    async def follow(self, exchanger: Awaitable[Exchanger]) -> None:
        """Run until cancelled, or until the pool is gone, which sets `orphaned`.

        Args:
            exchanger: Done when the replica has loaded its first weights; until then only its questions tell
                the pool that it is alive.
        """
        listening = asyncio.create_task(self._listen())
        try:
            await self._act(await exchanger)
        finally:
            listening.cancel()

    async def _listen(self) -> None:
        known = -1
        while not self.orphaned:
            try:
                wanted = await self._ask(known)
            except Exception:  # the pool is restarting, or this replica is about to end as well
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            known = wanted.serial
            self.orphaned = wanted.run != self._run
            self._wanted = wanted
            self._news.set()

    async def _act(self, exchanger: Exchanger) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self.orphaned:
                return
            assert self._wanted is not None
            state = await self._obey(exchanger, self._wanted)
            try:
                await self._report(state)
            except Exception:  # reported again after the next answer of the pool
                continue

    async def _obey(self, exchanger: Exchanger, wanted: WantedVersions) -> ReplicaState:
        """Change to the wanted versions; repeated with every answer of the pool until it succeeds."""
        goal = wanted.prepare
        try:
            if wanted.use != self._uses:
                await self._prepare(exchanger, wanted.use)
                await exchanger.exchange(wanted.use)
                self._uses, self._ready = wanted.use, None
            if goal is not None:
                await self._prepare(exchanger, goal)
            elif self._ready is not None:
                exchanger.forget()
                self._ready = None
        except Exception as error:
            text = str(error) if isinstance(error, RaymoeError) else f"{type(error).__name__}: {error}"
            failed = None if goal is None else goal.epoch
            return ReplicaState(uses=self._uses.epoch, failed=failed, failure=text)
        return ReplicaState(uses=self._uses.epoch, ready=None if self._ready is None else self._ready.epoch)

    async def _prepare(self, exchanger: Exchanger, version: WeightsVersion) -> None:
        if self._ready != version:
            exchanger.forget()
            self._ready = None
            await exchanger.prepare(version)
            self._ready = version


__all__ = ["Exchanger", "Follower"]
