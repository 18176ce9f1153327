"""The change of a deployment from one version of its weights to another, as the replicas and the pool see it.

Replicas ask what is wanted of them, and say how they stand; nothing is pushed. What they get is always the
whole of it, so that a replica that missed something, or came late, ends up where the others are. A change has
two phases: every replica gets the new version ready beside the old, then every replica exchanges them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from errors import ProtocolError, ResourceError
from jobs.serving.versions import ReplicaState, WantedVersions, WeightsVersion

_ASK_SECONDS = 5.0  # a question is answered after this time at the latest, and asked again


@dataclass(slots=True)
class _PoolMember:
    standing: ReplicaState
    seen: float


@dataclass(slots=True)
class Rollout:
    """The replicas of a deployment, and what is wanted of them; all calls come from one event loop.

    Args:
        run: names this pool.
        version: to begin with.
        patience: seconds after which a replica that asks nothing is taken for dead.
        clock: seconds.
    """

    run: str
    version: WeightsVersion
    patience: float = 30.0
    clock: Callable[[], float] = time.monotonic
    _wanted: WantedVersions = field(init=False)
    _members: dict[str, _PoolMember] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._wanted = WantedVersions(run=self.run, serial=0, use=self.version)

    @property
    def uses(self) -> WeightsVersion:
        """What replicas are to compute with."""
        return self._wanted.use

    @property
    def trunks(self) -> dict[str, str]:
        """Addresses of the replicas that take requests, by name."""
        self._bury()
        return {name: at for name, one in self._members.items() if (at := one.standing.address)}

    @property
    def replicas(self) -> int:
        """Of the trunk, that are there."""
        return sum(not member.standing.interface for member in self._alive())

    def join(self, name: str) -> WeightsVersion:
        """A replica begins; the version to begin with."""
        use = self._wanted.use
        self._members[name] = _PoolMember(ReplicaState(uses=use.epoch), self.clock())
        return use

    def leave(self, name: str) -> None:
        """A replica ends."""
        self._members.pop(name, None)
        self._notify()

    async def attend(self, name: str) -> None:
        """Lasts as long as a replica is there."""
        self._bury()
        while name in self._members:
            await self._news(_ASK_SECONDS, lambda: name not in self._members)
            self._bury()

    async def ask(self, name: str, known: int) -> WantedVersions:
        """What is wanted, as soon as its serial is not the one that the replica knows, or after some time."""
        self._see(name)
        if self._wanted.serial == known:
            await self._news(_ASK_SECONDS, lambda: self._wanted.serial != known)
            self._see(name)
        return self._wanted

    def report(self, name: str, standing: ReplicaState) -> None:
        """Take note of a replica's standing."""
        self._members[name] = _PoolMember(standing, self.clock())
        self._notify()

    async def prepare(self, version: WeightsVersion) -> None:
        """Let every replica get a version ready, whose epoch no other version had.

        Raises:
            ResourceError: one of them cannot; none holds it any more.
        """
        self._want(self._wanted.use, version)
        while not all(member.standing.ready == version.epoch for member in self._alive()):
            for name, member in self._members.items():
                if member.standing.failed == version.epoch:
                    self.abandon()
                    raise ResourceError(f"replica {name} cannot load it: {member.standing.failure}")
            await self._news(1.0)

    def abandon(self) -> None:
        """Let every replica drop what it got ready."""
        self._want(self._wanted.use, None)

    async def exchange(self) -> None:
        """Let every replica use the version that it got ready; returns when all do."""
        new = self._wanted.prepare
        if new is None:
            raise ProtocolError("no version has been prepared; prepare one first")
        self._want(new, None)
        while not all(member.standing.uses == new.epoch for member in self._alive()):
            await self._news(1.0)

    def _want(self, use: WeightsVersion, prepare: WeightsVersion | None) -> None:
        self._wanted = WantedVersions(run=self.run, serial=self._wanted.serial + 1, use=use, prepare=prepare)
        self._notify()

    def _see(self, name: str) -> None:
        if name in self._members:
            self._members[name].seen = self.clock()

    def _bury(self) -> None:
        for name, member in list(self._members.items()):
            if self.clock() - member.seen > self.patience:
                del self._members[name]

    def _alive(self) -> list[_PoolMember]:
        self._bury()
        return list(self._members.values())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _news(self, seconds: float, wanted: Callable[[], bool] = lambda: True) -> None:
        """Wait for a change that is wanted, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._changed.wait()
                    if wanted():
                        return


__all__ = ["Rollout"]
