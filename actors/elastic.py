"""Keeps experts where they should be while hosts come, go and die: one change at a time, whole or not at all.

A change plans a placement on the hosts that should hold experts, lets every host assemble its part under a
new epoch beside what it holds, publishes the table, and lets the hosts drop the old epoch. Until it is
published nothing has happened; a host that fails in the middle is taken for dead if it does not answer, and
the next attempt plans without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from actors.moves import Assembly, Origin
from actors.published import Placed, Published, holding, without
from actors.steps import HostControl
from cluster.membership import Membership, Orders, Scaling, Stage
from cluster.placement import Placement, Site, plan
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError, ResourceError, is_loss

_ATTEMPTS = 5
_PING_SECONDS = 1.0  # that a host has to answer after something went wrong with it
_LINGER_SECONDS = 5.0  # for requests under way on a host that goes

Sources = Sequence[Sequence[Sequence[str]]]
"""`[L][E]` -> ids of the hosts that an expert's state can be taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is placed, and how often.

    Attributes:
        layers: model layer index of each row of a placement.
        replicas: least number of hosts that hold each expert.
        redundant: further replicas of hot experts, in each layer.
    """

    layers: tuple[int, ...]
    n_experts: int
    n_group: int
    replicas: int = 1
    redundant: int = 0


class Elastic:
    """The hosts of a job and what they hold. Any thread may call.

    Args:
        shape: what is placed.
        membership: the hosts.
        versions: what they hold.
        control: how to command a host.
        reloadable: what no host holds any more can be read again from the version's directory: in serving,
            and not in training, where that has moved on.
        on_lost: is told of a host that is dead, and why.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        shape: Shape,
        membership: Membership,
        versions: Published,
        control: Callable[[HostInfo], HostControl],
        *,
        reloadable: bool = True,
        on_lost: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.shape = shape
        self._reloadable = reloadable
        self._on_lost = on_lost
        self.versions = versions
        self._membership = membership
        self._control = control
        self._clock = clock
        self.changed = threading.Condition()  # guards the membership
        self._changing = threading.Lock()  # one change at a time
        self._controls: dict[str, HostControl] = {}
        self._asked: set[str] = set()
        self._loaded: Placed | None = None
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="hosts")

    # --- who is there

    def register(self, info: HostInfo, *, founder: bool = False) -> None:
        """Take in a host; a repeat is fine.

        Args:
            founder: it holds its part of the first version already.
        """
        with self.changed:
            stage = Stage.SERVING if founder else Stage.JOINING
            self._membership.register(info, self._clock(), stage=stage)
            self._controls.setdefault(info.id, self._control(info))
            self.changed.notify_all()

    def lose(self, id: str, why: str) -> bool:
        """Take a host for dead, at once: tables come without it. Whether it was there."""
        with self.changed:
            was = self._membership.lose(id, why, self._clock())
            self.changed.notify_all()
        if was:
            self._gone(id, why)
        return was

    def suspect(self, id: str, why: str) -> None:
        """Somebody cannot reach a host: ask it, and bury it if it does not answer."""
        control = self._controls.get(id)
        if control is not None:
            with self._shut_down_is_fine():
                self._pool.submit(self._probe, id, control, why)

    def saw(self, id: str) -> None:
        """A host has answered."""
        with self.changed:
            self._membership.saw(id, self._clock())

    def silent(self, patience: float) -> list[str]:
        """Hosts that have not answered for so many seconds."""
        with self.changed:
            return self._membership.silent(self._clock(), patience)

    def scale(self, target: int) -> Scaling:
        """See `Membership.scale`."""
        with self.changed:
            scaling = self._membership.scale(target, self._clock())
            self.changed.notify_all()
            return scaling

    def drain(self, id: str, *, replace: bool = False) -> Scaling:
        """See `Membership.drain`."""
        with self.changed:
            scaling = self._membership.drain(id, self._clock(), replace=replace)
            self.changed.notify_all()
            return scaling

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str]
    ) -> tuple[Orders, int]:
        """What whoever runs the hosts has to do, told how they stand, and how many hosts are wanted."""
        with self.changed:
            for id, why in failed.items():
                self._membership.start_failed(id, why, self._clock())
            self._membership.stopped(stopped)
            orders = self._membership.orders(starting, self._clock())
            self.changed.notify_all()
        for id, why in failed.items():
            self._gone(id, why)
        return orders, self._membership.wanted

    def hosts(self) -> dict[str, tuple[HostInfo, HostControl]]:
        """Hosts that are there, in the order in which they came."""
        with self.changed:
            return {
                id: (member.info, self._controls[id])
                for id, member in self._membership.members.items()
                if id in self._controls
            }

    def ping_all(self, timeout: float) -> None:
        """Ask all hosts for a sign of life, without waiting for it: those that hang up are buried."""
        with self._shut_down_is_fine():
            for id, (_, control) in self.hosts().items():
                if id not in self._asked:
                    self._asked.add(id)
                    self._pool.submit(self._ask, id, control, timeout)

    def await_sites(self, timeout: float) -> tuple[Site, ...]:
        """The hosts that should hold experts, once there is one.

        Raises:
            ResourceError: there is none within so many seconds.
        """
        with self.changed:
            if not self.changed.wait_for(self._membership.sites, timeout):
                raise ResourceError(f"no expert host has come up within {timeout:g} s")
            return self._membership.sites()

    def bury_the_dead(self, why: str) -> bool:
        """Ask all hosts; whether one of them did not answer, and is taken for dead."""
        members = self.hosts()
        probes = [self._pool.submit(self._probe, id, control, why) for id, (_, control) in members.items()]
        return not all([probe.result() for probe in probes])

    def describe(self) -> list[dict[str, Any]]:
        """Every host as `raymoe status` shows it."""
        current = self.versions.current
        held = {} if current is None else holding(current.placement)
        found = []
        for id, (info, control) in self.hosts().items():
            member = self._membership.members.get(id)
            stats = None
            with suppress(RaymoeError):
                stats = control.stats()
            found.append(
                {
                    "id": id,
                    "node": info.node,
                    "pid": info.pid,
                    "addresses": dict(info.addresses),
                    "state": "gone" if member is None else str(member.stage),
                    "channel": "grpc" if info.addresses.get("shm") is None else "shm",
                    "experts": sum(map(len, held.get(id, ()))),
                    "answers": stats is not None,
                    "in_flight": 0 if stats is None else stats.in_flight,
                    "rows": 0 if stats is None else stats.rows,
                    "busy_seconds": 0.0 if stats is None else stats.busy_seconds,
                }
            )
        return found

    # --- what they hold

    def held(self) -> dict[str, tuple[tuple[int, ...], ...]] | None:
        """What live hosts hold of the version in use; None before there is one."""
        current = self.versions.current
        return None if current is None else holding(current.placement)

    def adopt(self, versions: Sequence[Placed]) -> None:
        """Hosts hold these already: a coordinator before this one has seen to it."""
        with self._changing:
            infos = self._infos()
            kept = []
            for version in versions:
                placement = version.placement
                for site in placement.sites:
                    placement = placement if site in infos else without(placement, site)
                kept.append(replace(version, placement=placement))
            self.versions.publish(kept, infos)
        with self.changed:
            self._membership.placed(self._placed(), self._clock())

    def due(self) -> str | None:
        """Why experts have to move; None when they are where they should be."""
        with self.changed:
            sites = {site.id for site in self._membership.sites()}
            self._membership.placed(self._placed(), self._clock())
        current = self.versions.current
        if current is None or not sites:
            return None
        there = set(current.placement.sites)
        if sites - there:
            return f"{', '.join(sorted(sites - there))} joined"
        if there - sites:
            return f"{', '.join(sorted(there - sites))} leaves"
        copies = min(self.shape.replicas, len(sites))
        if any(len(ids) < copies for row in current.placement.holders for ids in row):
            return "experts lack a replica"
        return None

    def reshape(self, why: str, *, step: int | None = None) -> float:
        """Bring the experts to where they should be; the seconds that it took.

        Args:
            step: in training, the step that the hosts' state is for; nobody may train meanwhile.

        Raises:
            RaymoeError: it cannot be done now; nothing has changed.
        """
        with self._changing:
            began = time.monotonic()
            for attempt in range(_ATTEMPTS):
                try:
                    moved = self._reshape(step)
                    break
                except RaymoeError as error:
                    if not self.bury_the_dead(str(error)) or attempt == _ATTEMPTS - 1:
                        with self.changed:
                            self._membership.note(self._clock(), "failed", f"moving experts ({why}): {error}")
                        raise
            seconds = time.monotonic() - began
            with self.changed:
                self._membership.note(
                    self._clock(), "moved", f"{moved} experts in {seconds:.2f} s, since {why}"
                )
                self.changed.notify_all()
            return seconds

    def install(
        self, version: Placed, sources: Sources, *, step: int | None = None, moments: bool = False
    ) -> None:
        """Let the hosts assemble a version and publish it as the only one.

        Args:
            version: its placement says who is to hold what.
            sources: of each expert; where there is none, it is read from `version.directory`.
            step: in training, the step that the state is for.
            moments: whether the directory has the optimizer's state too.

        Raises:
            RaymoeError: what a host failed with; nothing has been published.
        """
        with self._changing:
            self._assemble([(version, sources, None)], step, moments=moments)
            self._publish([version])

    def load(self, directory: str, name: str) -> int:
        """Let every host load other weights beside those in use, in the same places; their epoch.

        Raises:
            RaymoeError: what a host failed with; the others have dropped theirs.
        """
        with self._changing:
            current = self.versions.current
            if current is None:
                raise ResourceError("no experts are served yet; wait until they are")
            version = Placed(
                name=name,
                epoch=self.versions.next_epoch(),
                directory=directory,
                placement=current.placement,
            )
            try:
                self._assemble([(version, nothing(version.placement), None)], None)
            except RaymoeError:
                self._retain([v.epoch for v in self.versions.live])
                raise
            self._loaded = version
            return version.epoch

    def use(self, epoch: int) -> None:
        """Publish the weights that were loaded last beside those before them.

        Raises:
            ResourceError: hosts have changed meanwhile, or nothing has been loaded under this epoch.
        """
        with self._changing:
            current, version = self.versions.current, self._loaded
            if current is not None and current.epoch == epoch:
                return
            if version is None or current is None or version.epoch != epoch:
                raise ResourceError(
                    f"no weights have been loaded for epoch {epoch}, or the expert hosts have changed since; "
                    "load them again"
                )
            self._loaded = None
            self.versions.publish([*self.versions.live, version], self._infos())

    def retire(self) -> None:
        """Drop all versions but the one in use."""
        with self._changing:
            self._loaded = None
            current = self.versions.current
            if current is not None:
                self._publish([current])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- how

    def _reshape(self, step: int | None) -> int:
        """One attempt; experts that a host had to get."""
        with self.changed:
            sites = self._membership.sites()
        self._loaded = None  # it was placed on other hosts
        work: list[tuple[Placed, Sources, int | None]] = []
        moved = 0
        for version in self.versions.live:
            held = holding(version.placement)
            placement = plan(
                sites,
                n_layers=len(self.shape.layers),
                n_experts=self.shape.n_experts,
                n_group=self.shape.n_group,
                replicas=self.shape.replicas,
                redundant=self.shape.redundant,
                held=held,
            )
            new = Placed(
                name=version.name,
                epoch=self.versions.next_epoch(),
                directory=version.directory,
                placement=placement,
            )
            work.append((new, version.placement.holders, version.epoch))
            for id, rows in holding(placement).items():
                before = held.get(id, [()] * len(rows))
                moved += sum(len(set(row) - set(old)) for row, old in zip(rows, before, strict=True))
        self._assemble(work, step)
        self._publish([version for version, _, _ in work])
        return moved

    def _assemble(
        self,
        work: Sequence[tuple[Placed, Sources, int | None]],
        step: int | None,
        *,
        moments: bool = False,
    ) -> None:
        """Let all hosts assemble their parts, all of them at once."""
        members = self.hosts()
        infos = {id: info for id, (info, _) in members.items()}
        orders: dict[str, list[Assembly]] = {id: [] for id in members}
        for version, sources, base in work:
            held = holding(version.placement)
            for id in members:
                rows = held.get(id, ((),) * len(self.shape.layers))
                order = assembly(id, rows, version, sources, infos, self.shape.layers, base, step)
                orders[id].append(replace(order, moments=moments))

        def obey(id: str) -> None:
            for order in orders[id]:
                members[id][1].assemble(order)

        self._on(members, "assemble its experts", obey)

    def _publish(self, versions: Sequence[Placed]) -> None:
        """Make these the live ones; hosts drop all others, and those that hold nothing are let go."""
        if not self._reloadable:
            versions = [replace(version, directory=None) for version in versions]
        self.versions.publish(versions, self._infos())
        self._retain([version.epoch for version in versions])
        with self.changed:
            leaving = {
                id for id, m in self._membership.members.items() if m.stage is Stage.LEAVING
            } - self._placed()
        self._linger(leaving)
        with self.changed:
            self._membership.placed(self._placed(), self._clock())

    def _retain(self, epochs: Sequence[int]) -> None:
        """Let hosts drop other epochs; who cannot be reached is dealt with as dead, by others."""

        def retain(id: str) -> None:
            members[id][1].retain(*epochs)

        members = self.hosts()
        with suppress(RaymoeError):
            self._on(members, "drop experts", retain)

    def _linger(self, leaving: Iterable[str]) -> None:
        """Wait until hosts that go have answered what they are at."""
        deadline = time.monotonic() + _LINGER_SECONDS
        for id in leaving:
            control = self._controls.get(id)
            with suppress(RaymoeError):
                while control is not None and control.stats().in_flight and time.monotonic() < deadline:
                    time.sleep(0.005)

    def _on(self, ids: Iterable[str], what: str, call: Callable[[str], None]) -> None:
        """Call for every host at once; all are waited for, then the first error raised."""
        pending = {id: self._pool.submit(call, id) for id in ids}
        errors: list[tuple[str, Exception]] = []
        for id, future in pending.items():
            error = future.exception()
            if isinstance(error, Exception):
                errors.append((id, error))
        if errors:
            text = "; ".join(f"expert host {id} failed to {what}: {error}" for id, error in errors)
            kind = ChannelError if any(is_loss(e) for _, e in errors) else RaymoeError
            raise kind(text) from errors[0][1]

    def _probe(self, id: str, control: HostControl, why: str) -> bool:
        try:
            control.ping(_PING_SECONDS)
        except RaymoeError as error:
            if is_loss(error):
                self.lose(id, f"{why} ({error})")
                return False
        self.saw(id)
        return True

    def _ask(self, id: str, control: HostControl, timeout: float) -> None:
        """A sign of life; a host that is slow to give it has until its silence counts."""
        try:
            control.ping(timeout)
        except ChannelTimeout:
            return
        except RaymoeError as error:
            if is_loss(error):
                self._probe(id, control, str(error))
                return
        finally:
            self._asked.discard(id)
        self.saw(id)

    def _gone(self, id: str, why: str) -> None:
        """A host is out of the membership: tables come without it, and whoever waits for it hears so."""
        control = self._controls.pop(id, None)
        self.versions.without(id)
        if control is not None:
            control.close()
        if self._on_lost is not None:
            self._on_lost(id, why)

    def _placed(self) -> set[str]:
        current = self.versions.current
        return set() if current is None else set(current.placement.sites)

    def _infos(self) -> dict[str, HostInfo]:
        return {id: info for id, (info, _) in self.hosts().items()}

    def _shut_down_is_fine(self) -> suppress:
        return suppress(RuntimeError)  # of a pool that takes no more work


def assembly(
    id: str,
    rows: Sequence[Sequence[int]],
    version: Placed,
    sources: Sources,
    infos: Mapping[str, HostInfo],
    layers: Sequence[int],
    base: int | None,
    step: int | None,
) -> Assembly:
    """What one host has to do for a version.

    Args:
        rows: per layer row the experts that it is to hold.
        infos: of hosts that can be asked.
    """
    pulls: dict[str, dict[int, list[int]]] = {}
    for at, experts in enumerate(rows):
        for expert in experts:
            there = [other for other in sources[at][expert] if other in infos]
            if id not in there and there:
                peer = there[(at + expert) % len(there)]  # spread over those that have it
                pulls.setdefault(peer, {}).setdefault(layers[at], []).append(expert)
    return Assembly(
        epoch=version.epoch,
        experts={layer: tuple(experts) for layer, experts in zip(layers, rows, strict=True) if experts},
        base=base,
        step=step,
        origins=tuple(
            Origin(host=infos[peer], experts={layer: tuple(experts) for layer, experts in wanted.items()})
            for peer, wanted in pulls.items()
        ),
        directory=version.directory,
    )


def nothing(placement: Placement) -> Sources:
    """Sources where there are none."""
    return [[()] * len(row) for row in placement.holders]


__all__ = ["Elastic", "Shape", "Sources", "assembly", "nothing"]
