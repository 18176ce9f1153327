"""Which expert hosts there are and what is to be done about it: a state machine without clock or network.

A host registers (joining), is given experts (serving), and goes: because fewer are wanted or it is drained
(leaving, until its experts are elsewhere), or because it died. What follows from that is said as data: which
hosts should hold experts (`sites`), and what whoever runs the hosts has to start and to stop (`orders`).
Everything is told with the time, so that a test can run years of it in a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.placement import Site
from cluster.topology import HostInfo
from errors import ConfigError, ProtocolError, ResourceError

_EVENTS = 256  # that are kept
_BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before another host is started after one, two, … starts in a row that came to nothing."""


class Stage(StrEnum):
    """Where a host is in its life."""

    JOINING = "joining"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(slots=True)
class Member:
    """A host that is there.

    Attributes:
        seen: when it last answered.
    """

    info: HostInfo
    stage: Stage
    seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        at: seconds since the epoch.
        kind: one word, as `joined`, `left`, `died`, `scaled`, `moved`, `failed`.
    """

    at: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What whoever runs the hosts has to do.

    Attributes:
        start: hosts to start now, beside those that are on their way.
        stop: hosts to end now; they hold nothing, or are dead or hung.
    """

    start: int
    stop: tuple[str, ...]


@dataclass(slots=True)
class Scaling:
    """A change of the number of hosts that somebody asked for.

    Attributes:
        before: the number to go back to when it fails.
        replaced: a host in whose place another one shall come; it stays when none does.
        ended: when it was reached, or, given up, when the hosts were as before.
        failure: why it was given up.
    """

    target: int
    before: int
    began: float
    replaced: str | None = None
    ended: float | None = None
    failure: str | None = None


@dataclass(slots=True)
class Membership:
    """The hosts of one job.

    Args:
        wanted: hosts that there should be.
        most: hosts that there can be, of which each holds an expert.
        retiring: hosts that are to go when they register: a membership before this one wanted so.
    """

    wanted: int
    most: int
    members: dict[str, Member] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_EVENTS))
    scaling: Scaling | None = None
    retiring: frozenset[str] = frozenset()
    _buried: dict[str, str] = field(default_factory=dict)  # id -> why, until it has been stopped
    _known: set[str] = field(default_factory=set)
    _failures: int = 0
    _not_before: float = 0.0

    def register(self, info: HostInfo, now: float) -> None:
        """A host is there, and holds nothing that counts yet. A repeat is fine.

        Raises:
            ProtocolError: a host of this name has been there and is gone.
        """
        if info.id in self.members:
            self.members[info.id].seen = now
            return
        if info.id in self._known:
            raise ProtocolError(
                f"expert host {info.id} was taken out ({self._buried.get(info.id, 'it had left')}); names "
                "are not used again, start it under another one"
            )
        self._known.add(info.id)
        stage = Stage.LEAVING if info.id in self.retiring else Stage.JOINING
        self.members[info.id] = Member(info, stage, now)
        self.note(now, "joined", f"expert host {info.id} on node {info.node[:8] or '?'}, process {info.pid}")
        self._retire_surplus()

    def saw(self, id: str, now: float) -> None:
        """A host has answered."""
        member = self.members.get(id)
        if member is not None:
            member.seen = now

    def silent(self, now: float, patience: float) -> list[str]:
        """Hosts that have not answered for so many seconds."""
        return [id for id, member in self.members.items() if now - member.seen > patience]

    def lose(self, id: str, why: str, now: float) -> bool:
        """A host is dead, or to be taken for it; whether it was there."""
        member = self.members.pop(id, None)
        if member is None:
            return False
        self._buried[id] = why
        self.note(now, "died", f"expert host {id}: {why}")
        if member.stage is Stage.JOINING:
            self._start_came_to_nothing(now)
            self._give_up(f"expert host {id} died while joining: {why}", now)
        return True

    def start_failed(self, id: str, why: str, now: float) -> None:
        """A host that was to be started did not come up."""
        if id in self._known:
            self.lose(id, why, now)
            return
        self._known.add(id)
        self.note(now, "failed", f"expert host {id} did not start: {why}")
        self._start_came_to_nothing(now)
        self._give_up(f"expert host {id} did not start: {why}", now)

    def stopped(self, ids: Iterable[str]) -> None:
        """These have been ended."""
        for id in ids:
            self._buried.pop(id, None)

    def scale(self, target: int, now: float, *, replaced: str | None = None) -> Scaling:
        """Want another number of hosts. What was given up does not stand in the way.

        Args:
            replaced: see `Scaling`.

        Raises:
            ConfigError: less than one, or more than there are experts in a layer.
            ResourceError: another change is under way.
        """
        if not 1 <= target <= self.most:
            raise ConfigError(
                f"{target} expert hosts cannot be: every layer has {self.most} routed experts, so it takes 1 "
                f"to {self.most}"
            )
        if self.under_way is not None:
            raise ResourceError(
                f"the change to {self.under_way.target} expert hosts is under way; wait for its end, which "
                "`raymoe status` tells"
            )
        self.scaling = Scaling(target=target, before=self.wanted, began=now, replaced=replaced)
        self.wanted = target
        self.note(now, "scaling", f"from {self.scaling.before} to {target} expert hosts")
        self._retire_surplus()
        return self.scaling

    def drain(self, id: str, now: float, *, replace: bool = False) -> Scaling:
        """Let a chosen host give its experts away and go.

        Args:
            replace: start another one in its place; else one less is wanted.

        Raises:
            ConfigError: there is no such host, or it is the only one and is not to be replaced.
            ResourceError: another change is under way.
        """
        member = self.members.get(id)
        if member is None:
            raise ConfigError(f"there is no expert host {id}; these are there: {', '.join(self.members)}")
        target = self.wanted if replace else self.wanted - 1
        if target < 1:
            raise ConfigError(f"expert host {id} is the only one; let another take its place (--replace)")
        stage, member.stage = member.stage, Stage.LEAVING
        try:
            scaling = self.scale(target, now, replaced=id if replace else None)
        except (ConfigError, ResourceError):
            member.stage = stage
            raise
        self.note(now, "draining", f"expert host {id}")
        return scaling

    @property
    def under_way(self) -> Scaling | None:
        """The change that is neither reached nor given up yet; None without one."""
        scaling = self.scaling
        return (
            None if scaling is None or scaling.ended is not None or scaling.failure is not None else scaling
        )

    def sites(self) -> tuple[Site, ...]:
        """The hosts that should hold experts, in the order in which they came.

        While too few of those that stay are there, those that leave stay too.
        """
        staying = [m for m in self.members.values() if m.stage is not Stage.LEAVING]
        if len(staying) < min(self.wanted, len(self.members)):
            waiting = [m for m in self.members.values() if m.stage is Stage.LEAVING]
            staying += waiting[: self.wanted - len(staying)]
        return tuple(Site(id=m.info.id, node=m.info.node) for m in staying)

    def placed(self, ids: Iterable[str], now: float) -> None:
        """These hosts, and no others, hold experts now."""
        holding = set(ids)
        for id, member in list(self.members.items()):
            if id in holding and member.stage is Stage.JOINING:
                member.stage = Stage.SERVING
                self._failures, self._not_before = 0, 0.0
            elif id not in holding and member.stage is Stage.LEAVING:
                del self.members[id]
                self._buried[id] = "it was retired"
                self.note(now, "left", f"expert host {id}")
        self._retire_surplus()
        scaling = self.scaling
        if scaling is not None and scaling.ended is None and len(self.members) == self.wanted:
            leaving = any(m.stage is not Stage.SERVING for m in self.members.values())
            if not leaving and holding == set(self.members):
                scaling.ended = now
                kind, how = ("scaled", "reached") if scaling.failure is None else ("failed", "back to")
                self.note(now, kind, f"{how} {self.wanted} expert hosts after {now - scaling.began:.2f} s")

    def orders(self, starting: int, now: float) -> Orders:
        """What is to be started and stopped.

        Args:
            starting: hosts that have been started and have not registered yet.
        """
        staying = sum(m.stage is not Stage.LEAVING for m in self.members.values())
        missing = self.wanted - staying - starting
        start = missing if now >= self._not_before else 0
        return Orders(start=max(0, start), stop=tuple(self._buried))

    def note(self, at: float, kind: str, text: str) -> None:
        """Remember an event."""
        self.events.append(Event(at=at, kind=kind, text=text))

    def _give_up(self, why: str, now: float) -> None:
        """A change that is under way and needs another host goes back to what was before."""
        scaling = self.under_way
        if scaling is None or (scaling.target <= scaling.before and scaling.replaced is None):
            return
        scaling.failure = why
        self.wanted = scaling.before
        if scaling.replaced in self.members:
            self.members[scaling.replaced].stage = Stage.SERVING
        self.note(now, "failed", f"the change to {scaling.target} expert hosts: {why}")
        self._retire_surplus()
        serving = [m for m in self.members.values() if m.stage is Stage.SERVING]
        if len(serving) == len(self.members) == self.wanted:
            scaling.ended = now

    def _start_came_to_nothing(self, now: float) -> None:
        """Wait with the next one, longer each time, until one holds experts."""
        self._not_before = now + _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
        self._failures += 1

    def _retire_surplus(self) -> None:
        """Let the newest of too many go; those that hold nothing yet first."""
        staying = [m for m in self.members.values() if m.stage is not Stage.LEAVING]
        surplus = len(staying) - self.wanted
        newest = sorted(reversed(staying), key=lambda m: m.stage is not Stage.JOINING)
        for member in newest[: max(0, surplus)]:
            member.stage = Stage.LEAVING


__all__ = ["Event", "Member", "Membership", "Orders", "Scaling", "Stage"]
