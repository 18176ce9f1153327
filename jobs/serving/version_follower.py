"""A replica's part in a change of weights: asks what is wanted, does it, and says how it stands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from errors import RaymoeError
from jobs.serving.versions import ReplicaState, WantedVersions, WeightsVersion

_RETRY_SECONDS = 1.0


class Exchanger(Protocol):
    """Holds weights, and can hold others beside them."""

    async def prepare(self, version: WeightsVersion) -> None:
        """Load a version beside the one in use."""
        ...

    async def exchange(self, version: WeightsVersion) -> None:
        """Use the version that was prepared, from the next step on."""
        ...

    def forget(self) -> None:
        """Drop what was prepared."""
        ...


class Follower:
    """Keeps a replica at the version that the pool wants.

    Args:
        run: of the pool that the replica joined.
        version: that the replica begins with.
        ask: `Rollout.ask` of the pool for this replica, from a serial.
        report: `Rollout.report` likewise.
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
        """Runs until it is cancelled, or the pool that the replica joined is no more: then `orphaned` is set.

        Args:
            exchanger: there once the replica has loaded its own weights; until then the pool hears that it
                is alive.
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
            except Exception:  # the pool is away: it comes back, or this replica ends as well
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
            standing = await self._obey(exchanger, self._wanted)
            try:
                await self._report(standing)
            except Exception:  # said again with the next answer
                continue

    async def _obey(self, exchanger: Exchanger, wanted: WantedVersions) -> ReplicaState:
        """Do what is wanted, as far as it is not done; every answer of the pool tries again."""
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
