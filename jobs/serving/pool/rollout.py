"""The change of a deployment from one version of its weights to another.

Replicas ask which versions they should use and load, and report their state; nothing is pushed to them. Each
answer is complete, so a replica that missed an answer, or joined late, reaches the same state as the others.
A change has two phases: first every replica loads the new version beside the old one, then every replica
exchanges them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from errors import ProtocolError, ResourceError
from jobs.serving.versions import ReplicaState, WantedVersions, WeightsVersion

_ATTEND_SECONDS = 5.0  # between two looks for replicas that are dead


@dataclass(slots=True)
class _PoolMember:
    state: ReplicaState
    seen: float


@dataclass(slots=True)
class Rollout:
    """The replicas of a deployment and the versions that they should have; used in one event loop.

    Args:
        run: Name of the pool's run.
        version: The version to start with.
        patience: Seconds without a question after which a replica counts as dead.
        pause: Longest time in seconds until a question is answered, and asked again.
        clock: Seconds, monotonic.
    """

    run: str
    version: WeightsVersion
    patience: float = 30.0
    pause: float = 5.0
    clock: Callable[[], float] = time.monotonic
    _wanted: WantedVersions = field(init=False)
    _members: dict[str, _PoolMember] = field(default_factory=dict)
    _drained: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._wanted = WantedVersions(run=self.run, serial=0, use=self.version)

    @property
    def uses(self) -> WeightsVersion:
        """The version that replicas should compute with."""
        return self._wanted.use

    @property
    def trunks(self) -> dict[str, str]:
        """Addresses of the trunk replicas that accept requests, by name."""
        self._bury()
        return {name: at for name, one in self._members.items() if (at := one.state.address)}

    @property
    def replicas(self) -> int:
        """Number of trunk replicas."""
        return sum(not member.state.interface for member in self._alive())

    def join(self, name: str) -> WeightsVersion:
        """Add a replica; return the version that it starts with."""
        use = self._wanted.use
        self._members[name] = _PoolMember(ReplicaState(uses=use.epoch), self.clock())
        return use

    def leave(self, name: str) -> None:
        """Remove a replica."""
        self._members.pop(name, None)
        self._notify()

    async def attend(self, name: str) -> None:
        """Return when a replica has left or is dead."""
        self._bury()
        while name in self._members:
            await self._news(_ATTEND_SECONDS, lambda: name not in self._members)
            self._bury()

    async def ask(self, name: str, known: int) -> WantedVersions:
        """The wanted versions, as soon as their serial differs from `known`, or after a few seconds."""
        self._see(name)
        if self._wanted.serial == known:
            await self._news(self.pause, lambda: self._wanted.serial != known)
            self._see(name)
        return self._wanted

    def report(self, name: str, state: ReplicaState) -> None:
        """Record a replica's state."""
        self._members[name] = _PoolMember(state, self.clock())
        self._notify()

    async def prepare(self, version: WeightsVersion) -> None:
        """Have every replica load a version, whose epoch no other version has had; return when all have it.

        Raises:
            ResourceError: A replica failed to load it; all replicas drop it.
        """
        self._want(self._wanted.use, version)
        while not all(member.state.ready == version.epoch for member in self._alive()):
            for name, member in self._members.items():
                if member.state.failed == version.epoch:
                    self.abandon()
                    raise ResourceError(f"replica {name} cannot load it: {member.state.failure}")
            await self._news(1.0)

    def abandon(self) -> None:
        """Have every replica drop the version that it loaded."""
        self._want(self._wanted.use, None)

    async def exchange(self) -> None:
        """Have every replica use the version that it loaded; return when all do."""
        new = self._wanted.prepare
        if new is None:
            raise ProtocolError("no version has been prepared; prepare one first")
        self._want(new, None)
        while not all(member.state.uses == new.epoch for member in self._alive()):
            await self._news(1.0)

    async def close(self) -> None:
        """Have the interface refuse requests; return when no process of it has one in progress."""
        self._wanted = replace(self._wanted, serial=self._wanted.serial + 1, closing=True)
        self._notify()
        while not self._interfaces() <= self._drained:
            await self._news(1.0)

    def drained(self, name: str) -> None:
        """Record that a process of the interface refuses requests and has none in progress."""
        self._drained.add(name)
        self._notify()

    def _interfaces(self) -> set[str]:
        self._bury()
        return {name for name, member in self._members.items() if member.state.interface}

    def _want(self, use: WeightsVersion, prepare: WeightsVersion | None) -> None:
        self._wanted = replace(self._wanted, serial=self._wanted.serial + 1, use=use, prepare=prepare)
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
        """Wait for a change after which `wanted` is true, for at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._changed.wait()
                    if wanted():
                        return


__all__ = ["Rollout"]
