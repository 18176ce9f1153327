"""Membership of the expert hosts of a job: a state machine without clock or network.

A host registers (joining), gets experts (serving), and leaves: because fewer hosts are wanted or it is
drained (leaving, until its experts are elsewhere), or because it died. The consequences are data: the hosts
that should hold experts (`sites`), and the hosts that the fleet has to start and to stop (`orders`). Every
call takes the time as an argument, so tests need no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.events import Event, EventLog
from cluster.placement import Site
from cluster.topology import HostInfo
from errors import ChangeUnderWay, ConfigError, ProtocolError

_BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before another host is started after one, two, … failed starts in a row."""


class Stage(StrEnum):
    """Stage of a host's life."""

    JOINING = "joining"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(slots=True)
class Member:
    """A live host.

    Attributes:
        info: Where the host is reached.
        stage: Stage of its life.
        seen: Time of its last answer.
        drained: Whether the host was drained by name, rather than retired as surplus.
    """

    info: HostInfo
    stage: Stage
    seen: float
    drained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the fleet that runs the hosts has to do.

    Attributes:
        start: Number of hosts to start now, in addition to those that are starting.
        stop: Ids of hosts to end now; they hold nothing, or are dead, or hang.
        cancel: Number of hosts among those that are starting that are not wanted any more.
    """

    start: int
    stop: tuple[str, ...]
    cancel: int = 0


@dataclass(slots=True)
class Scaling:
    """A requested change of the number of hosts.

    Attributes:
        target: The requested number.
        before: The number that is restored when the change fails.
        began: Time of the request.
        drained: Id of a host that is to leave.
        replaced: Whether another host takes the place of the drained one, which stays when the change fails.
        ended: Time when the target was reached, or, after a failure, when the hosts were as before.
        failure: Why the change failed; None unless it did.
        superseded: Whether it failed because another change has taken its place.
    """

    target: int
    before: int
    began: float
    drained: str | None = None
    replaced: bool = False
    ended: float | None = None
    failure: str | None = None
    superseded: bool = False


@dataclass(slots=True)
class Membership:
    """The expert hosts of one job.

    Args:
        wanted: Number of hosts that the job should have.
        most: Number of hosts that the job can have, each with an expert of every layer.
        members: Host id -> live host, in the order of their registration.
        events: What happened.
        scaling: The latest requested change of the number of hosts.
        retiring: Hosts that leave once they register, since they were leaving under an earlier coordinator.
        lacking: What the cluster lacks for hosts that wait to be started; empty if nothing is known.
    """

    wanted: int
    most: int
    members: dict[str, Member] = field(default_factory=dict)
    events: EventLog = field(default_factory=EventLog)
    scaling: Scaling | None = None
    retiring: frozenset[str] = frozenset()
    lacking: str = ""
    _to_stop: dict[str, str] = field(default_factory=dict)  # former members: id -> why, until stopped
    _known: set[str] = field(default_factory=set)
    _failures: int = 0
    _not_before: float = 0.0

    def register(self, info: HostInfo, now: float) -> None:
        """Add a host, which holds no experts yet; a repeat only counts as an answer.

        Raises:
            ProtocolError: A host of this name was here before and is gone.
        """
        if info.id in self.members:
            self.members[info.id].seen = now
            return
        if info.id in self._known:
            raise ProtocolError(
                f"expert host {info.id} was taken out ({self._to_stop.get(info.id, 'it had left')}); names "
                "are not used again, start it under another one"
            )
        self._known.add(info.id)
        leaves = info.id in self.retiring
        self.members[info.id] = Member(info, Stage.LEAVING if leaves else Stage.JOINING, now, drained=leaves)
        self.note(now, "joined", f"expert host {info.id} on node {info.node[:8] or '?'}, process {info.pid}")
        self._retire_surplus()

    def saw(self, id: str, now: float) -> None:
        """Note that a host has answered."""
        member = self.members.get(id)
        if member is not None:
            member.seen = now

    def silent(self, now: float, patience: float) -> list[str]:
        """Hosts that have not answered for `patience` seconds."""
        return [id for id, member in self.members.items() if now - member.seen > patience]

    def lose(self, id: str, why: str, now: float) -> bool:
        """Remove a host that is dead or declared dead; returns whether it was a member."""
        member = self.members.pop(id, None)
        if member is None:
            return False
        self._to_stop[id] = why
        self.note(now, "died", f"expert host {id}: {why}")
        if member.stage is Stage.JOINING:
            self._delay_next_start(now)
            self._undo_scaling(f"expert host {id} died while joining: {why}", now)
        return True

    def start_failed(self, id: str, why: str, now: float) -> None:
        """Note that a host did not start, or that its process has ended."""
        if id in self._known:
            self.lose(id, why, now)
            return
        self._known.add(id)
        self.note(now, "failed", f"expert host {id} did not start: {why}")
        self._delay_next_start(now)
        self._undo_scaling(f"expert host {id} did not start: {why}", now)

    def stopped(self, ids: Iterable[str]) -> None:
        """Note that these hosts were ended as ordered."""
        for id in ids:
            self._to_stop.pop(id, None)

    def scale(self, target: int, now: float) -> Scaling:
        """Change the number of hosts that the job should have, in place of a change that is under way.

        A host that is being drained still leaves, unless another one is to replace it and the new change
        fails. The same target again is the same change.

        Args:
            target: The new number.
            now: The time.

        Raises:
            ConfigError: Fewer than one host, or more hosts than experts of a layer.
        """
        if not 1 <= target <= self.most:
            raise ConfigError(
                f"{target} expert hosts cannot be: every layer has {self.most} routed experts, so it takes 1 "
                f"to {self.most}"
            )
        last = self.under_way
        if last is None:
            return self._begin(Scaling(target=target, before=self.wanted, began=now))
        if last.target == target:
            return last
        last.failure, last.ended = f"the change to {target} expert hosts takes its place", now
        last.superseded = True
        return self._begin(
            Scaling(
                target=target,
                before=last.before,
                began=now,
                drained=last.drained,
                replaced=last.replaced,
            )
        )

    def drain(self, id: str, now: float, *, replace: bool = False) -> Scaling:
        """Retire one host once its experts are elsewhere.

        Args:
            id: The host.
            now: The time.
            replace: Start another host in its place; otherwise the job has one host less.

        Raises:
            ConfigError: The host does not exist, or is the only one and is not replaced.
            ChangeUnderWay: Another change is under way.
        """
        member = self.members.get(id)
        if member is None:
            raise ConfigError(f"no expert host is {id}; these are there: {', '.join(self.members) or 'none'}")
        target = self.wanted if replace else self.wanted - 1
        if target < 1:
            raise ConfigError(f"expert host {id} is the only one; let another take its place (--replace)")
        self.require_steady()
        member.stage, member.drained = Stage.LEAVING, True
        instead = ", for another one in its place" if replace else ""
        self.note(now, "draining", f"expert host {id}{instead}")
        # The host leaves even if a later change fails, so the number before that one is without it.
        return self._begin(Scaling(target=target, before=target, began=now, drained=id, replaced=replace))

    def require_steady(self) -> None:
        """Raise if a change of the number of hosts is under way.

        Raises:
            ChangeUnderWay: One is.
        """
        if self.under_way is not None:
            raise ChangeUnderWay(
                f"the change to {self.under_way.target} expert hosts is under way; wait for its end, which "
                "`raymoe status` tells, or give another number with `raymoe scale`"
            )

    @property
    def under_way(self) -> Scaling | None:
        """The requested change that is neither done nor failed; None if there is none."""
        scaling = self.scaling
        return (
            None if scaling is None or scaling.ended is not None or scaling.failure is not None else scaling
        )

    def sites(self) -> tuple[Site, ...]:
        """The hosts that should hold experts, in the order of their registration.

        As long as too few staying hosts have registered, leaving hosts keep their experts.
        """
        staying = [m for m in self.members.values() if m.stage is not Stage.LEAVING]
        if len(staying) < min(self.wanted, len(self.members)):
            waiting = [m for m in self.members.values() if m.stage is Stage.LEAVING]
            staying += waiting[: self.wanted - len(staying)]
        return tuple(Site(id=m.info.id, node=m.info.node) for m in staying)

    def placed(self, ids: Iterable[str], now: float) -> None:
        """Note that these hosts, and no others, hold experts now."""
        holding = set(ids)
        for id, member in list(self.members.items()):
            if id in holding and member.stage is Stage.JOINING:
                member.stage = Stage.SERVING
                self._failures, self._not_before = 0, 0.0
            elif id not in holding and member.stage is Stage.LEAVING:
                del self.members[id]
                self._to_stop[id] = "it was retired"
                self.note(now, "left", f"expert host {id}")
        self._retire_surplus()
        scaling = self.scaling
        if scaling is not None and scaling.ended is None and len(self.members) == self.wanted:
            leaving = any(m.stage is not Stage.SERVING for m in self.members.values())
            if not leaving and holding == set(self.members):
                scaling.ended = now
                kind, how = ("scaled", "reached") if scaling.failure is None else ("failed", "back to")
                self.note(now, kind, f"{how} {self.wanted} expert hosts after {now - scaling.began:.2f} s")

    def orders(self, starting: int, now: float, *, lacking: str = "") -> Orders:
        """The hosts to start and to stop.

        Args:
            starting: Hosts that were started and have not registered yet.
            now: The time.
            lacking: What the cluster lacks for hosts that wait to be started; empty if nothing is known.
        """
        if lacking and not self.lacking:
            self.note(now, "waiting", lacking)
        self.lacking = lacking
        staying = sum(m.stage is not Stage.LEAVING for m in self.members.values())
        missing = self.wanted - staying - starting
        start = missing if now >= self._not_before else 0
        return Orders(start=max(0, start), stop=tuple(self._to_stop), cancel=min(starting, max(0, -missing)))

    def note(self, at: float, kind: str, text: str) -> None:
        """Record an event."""
        self.events.add(Event(at=at, kind=kind, text=text))

    def _begin(self, scaling: Scaling) -> Scaling:
        """Begin a change that is possible; starts that failed earlier do not delay it."""
        before, self.scaling, self.wanted = self.wanted, scaling, scaling.target
        self._not_before = 0.0
        if not scaling.replaced or before != scaling.target:
            self.note(scaling.began, "scaling", f"from {before} to {scaling.target} expert hosts")
        self._keep_leaving()
        self._retire_surplus()
        return scaling

    def _undo_scaling(self, why: str, now: float) -> None:
        """Undo a change under way that needs another host."""
        scaling = self.under_way
        if scaling is None or (scaling.target <= scaling.before and not scaling.replaced):
            return
        scaling.failure = why
        self.wanted = scaling.before
        if scaling.replaced and scaling.drained in self.members:
            stays = self.members[scaling.drained]
            stays.stage, stays.drained = Stage.SERVING, False
        self.note(now, "failed", f"the change to {scaling.target} expert hosts: {why}")
        self._retire_surplus()
        serving = [m for m in self.members.values() if m.stage is Stage.SERVING]
        if len(serving) == len(self.members) == self.wanted:
            scaling.ended = now

    def _delay_next_start(self, now: float) -> None:
        """Delay the next start, longer after each failure until a host holds experts."""
        self._not_before = now + _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
        self._failures += 1

    def _keep_leaving(self) -> None:
        """Cancel the retirement of surplus hosts, up to the number that is wanted."""
        missing = self.wanted - sum(m.stage is not Stage.LEAVING for m in self.members.values())
        leaving = [m for m in self.members.values() if m.stage is Stage.LEAVING and not m.drained]
        for member in leaving[: max(0, missing)]:
            member.stage = Stage.JOINING

    def _retire_surplus(self) -> None:
        """Retire surplus hosts: those without experts first, then the newest."""
        staying = [m for m in self.members.values() if m.stage is not Stage.LEAVING]
        surplus = len(staying) - self.wanted
        newest = sorted(reversed(staying), key=lambda m: m.stage is not Stage.JOINING)
        for member in newest[: max(0, surplus)]:
            member.stage = Stage.LEAVING


__all__ = ["Member", "Membership", "Orders", "Scaling", "Stage"]
