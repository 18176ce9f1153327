"""Keeps experts where they should be while hosts come, go and die: one change at a time, whole or not at all.

A change plans a placement on the hosts that should hold experts, lets every host assemble its part under a
new epoch beside what it holds, publishes the table, and lets the hosts drop the old epoch. Until it is
published nothing has happened; a host that fails in the middle is taken for dead if it does not answer, and
the next attempt plans without it.

Locks: `_changing` is held by a change to its end; within it, for moments, `changed` and the lock of the
published tables, each alone. Whoever holds one of these two waits for nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from numpy.typing import ArrayLike

from actors.coordinator.host_roster import Roster, steady
from actors.coordinator.routing_tables import Published, holding
from actors.coordinator.transfer_plan import Shape, Work, arrivals, assemblies, nothing
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.steps import HostControl
from actors.messages.transfer_orders import Assembly
from cluster.membership import Membership, Stage
from cluster.placement import Holding, Placement, Site, plan
from cluster.topology import HostInfo
from errors import ChannelError, HostsChanged, RaymoeError, ResourceError, is_loss

_T = TypeVar("_T")
_ATTEMPTS = 5
_LINGER_SECONDS = 5.0  # for requests under way on a host that goes


class Elastic(Roster):
    """The hosts of a job and what they hold. Any thread may call.

    Args:
        shape: what is placed.
        reloadable: what no host holds any more can be read again from the version's directory: in serving,
            and not in training, where that has moved on.

    The others are those of `Roster`.
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
        patience: float = 1.0,
        clock: Callable[[], float] = steady,
        pool: Executor | None = None,
    ) -> None:
        super().__init__(
            membership, versions, control, on_lost=on_lost, patience=patience, clock=clock, pool=pool
        )
        self.shape = shape
        self._reloadable = reloadable
        self._changing = threading.Lock()  # one change at a time
        self._loaded: PlacedWeights | None = None
        self._loads: ArrayLike | None = None
        self._wish: str | None = None
        self._remembered: Holding | None = None

    def held(self) -> Holding | None:
        """What live hosts hold of the version in use, or held under a coordinator before; None if unknown."""
        current = self.versions.current
        return self._remembered if current is None else holding(current.placement)

    def remember(self, placement: Placement) -> None:
        """Hosts held this under a coordinator before; a first placement goes by it."""
        self._remembered = holding(placement)

    def replanned(self, loads: ArrayLike) -> Placement:
        """Where experts would be by these loads, `[L, E]`, on the hosts that are there."""
        with self.changed:
            sites = self._membership.sites()
        return self.planned(sites, self.held(), loads)

    def planned(
        self, sites: Sequence[Site], held: Holding | None, loads: ArrayLike | None = None
    ) -> Placement:
        """Where experts should be on these hosts, by the loads that were measured last unless given."""
        return plan(
            sites,
            n_layers=len(self.shape.layers),
            n_experts=self.shape.n_experts,
            n_group=self.shape.n_group,
            replicas=self.shape.replicas,
            redundant=self.shape.redundant,
            loads=self._loads if loads is None else loads,
            held=held,
        )

    def begin(
        self, name: str, directory: str, *, step: int | None = None, moments: bool = False, timeout: float = 0
    ) -> None:
        """Place all experts for the first time.

        Raises:
            RaymoeError: what a host failed with, or no host has come within so many seconds.
        """

        def attempt() -> None:
            placement = self.planned(self.await_sites(timeout), self._remembered)
            version = PlacedWeights(
                name=name, epoch=self.versions.next_epoch(), directory=directory, placement=placement
            )
            self._install(Work(version=version, sources=nothing(placement), moments=moments), step)

        with self._changing:
            if self.versions.current is None:
                self._persistently("the first placement", attempt)

    def adopt(self, versions: Sequence[PlacedWeights]) -> None:
        """Hosts hold these already: a coordinator before this one has seen to it."""
        with self._changing:
            self.versions.publish(versions, self._infos())
            self._retain([version.epoch for version in versions])
        self._settled(self._placed())

    def due(self) -> str | None:
        """Why experts have to move; None when they are where they should be."""
        self._settled(self._placed())
        with self.changed:
            sites = {site.id for site in self._membership.sites()}
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
        return self._wish

    def rebalance(self, why: str, loads: ArrayLike) -> None:
        """Experts are to be placed by these loads, `[L, E]`, from now on; whoever moves them sees to it."""
        with self.changed:
            self._loads, self._wish = loads, why
            self.changed.notify_all()

    def reshape(self, why: str, *, step: int | None = None) -> float:
        """Bring the experts to where they should be; the seconds that it took.

        Args:
            step: in training, the step that the hosts' state is for; nobody may train meanwhile.

        Raises:
            RaymoeError: it cannot be done now; nothing has changed.
        """
        with self._changing:
            began, self._wish = time.monotonic(), None
            try:
                moved = self._persistently(f"moving experts ({why})", lambda: self._reshape(step))
            except RaymoeError as error:
                self.note("failed", f"moving experts ({why}): {error}")
                raise
            seconds = time.monotonic() - began
            self.note("moved", f"{moved} experts in {seconds:.2f} s, since {why}")
            return seconds

    def install(self, work: Work, *, step: int | None = None) -> None:
        """Let the hosts assemble a version and publish it as the only one.

        Args:
            step: in training, the step that the state is for.

        Raises:
            RaymoeError: what a host failed with; nothing has been published.
        """
        with self._changing:
            self._install(work, step)

    def load(self, directory: str, name: str) -> int:
        """Let every host load other weights beside those in use, in the same places; their epoch.

        Raises:
            RaymoeError: what a host failed with; the others have dropped theirs.
        """

        def attempt() -> PlacedWeights:
            current = self.versions.current
            if current is None:
                raise ResourceError("no experts are served yet; wait until they are")
            placement = current.placement
            version = PlacedWeights(
                name=name, epoch=self.versions.next_epoch(), directory=directory, placement=placement
            )
            self._assemble([Work(version=version, sources=nothing(placement))], None, "load the weights")
            return version

        with self._changing:
            self._loaded = self._persistently("loading other weights", attempt)
            return self._loaded.epoch

    def use(self, epoch: int) -> None:
        """Publish the weights that were loaded last beside those before them.

        Raises:
            HostsChanged: they have meanwhile, or nothing has been loaded under this epoch.
        """
        with self._changing:
            current, version, infos = self.versions.current, self._loaded, self._infos()
            if current is not None and current.epoch == epoch:
                return
            if (
                version is None
                or current is None
                or version.epoch != epoch
                or not infos.keys() >= set(version.placement.sites)
            ):
                raise HostsChanged(
                    f"no weights have been loaded for epoch {epoch}, or the expert hosts have changed since; "
                    "load them again"
                )
            self._loaded = None
            self.versions.publish([*self.versions.live, version], infos)

    def retire(self, keep: str = "") -> None:
        """Drop all versions but the weights of this name, or where there are none, those in use."""
        with self._changing:
            self._loaded = None
            live = {version.name: version for version in self.versions.live}
            kept = live.get(keep, self.versions.current)
            if kept is not None:
                self._publish([kept])

    # --- how; with `_changing` held

    def _persistently(self, what: str, attempt: Callable[[], _T]) -> _T:
        """Again while hosts die in the middle."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return attempt()
            except RaymoeError as error:
                if not self.bury_the_dead(f"{what} failed: {error}"):
                    raise
        return attempt()

    def _reshape(self, step: int | None) -> int:
        """One attempt; experts that a host had to get."""
        with self.changed:
            sites = self._membership.sites()
        live = self.versions.live
        if not sites:
            raise ResourceError("there is no expert host")
        if not self._reloadable and any(not ids for v in live for row in v.placement.holders for ids in row):
            raise ChannelError("experts are lost; the run has to go back to what is kept of them")
        self._loaded = None  # it was placed on other hosts
        work, moved = [], 0
        for version in live:
            held = holding(version.placement)
            placement = self.planned(sites, held)
            new = replace(version, epoch=self.versions.next_epoch(), placement=placement)
            work.append(Work(version=new, sources=version.placement.holders, base=version.epoch))
            moved += arrivals(placement, held)
        self._assemble(work, step)
        self._publish([one.version for one in work])
        return moved

    def _install(self, work: Work, step: int | None) -> None:
        self._loaded = None
        self._assemble([work], step)
        self._publish([work.version])

    def _assemble(self, work: Sequence[Work], step: int | None, what: str = "assemble its experts") -> None:
        """Let all hosts assemble their parts, all of them at once; else all drop what they have got."""
        members = self.hosts()
        infos = {id: info for id, (info, _) in members.items()}
        orders = [assemblies(one, infos, self.shape.layers, step) for one in work]

        def obey(id: str) -> None:
            for order in orders:
                members[id][1].assemble(order[id])

        try:
            self._on(members, what, obey)
        except RaymoeError:
            self._drop_what_is_not_live(step)
            raise

    def _drop_what_is_not_live(self, step: int | None) -> None:
        """A version has come to nothing; hosts that joined for it hold nothing, as before."""
        live, members = self.versions.live, self.hosts()

        def hold_nothing(id: str) -> None:
            for version in live:
                members[id][1].assemble(Assembly(epoch=version.epoch, experts={}, step=step))

        if live:
            with suppress(RaymoeError):
                self._on(members.keys() - self._placed(), "hold nothing", hold_nothing)
            self._retain([version.epoch for version in live])

    def _publish(self, versions: Sequence[PlacedWeights]) -> None:
        """Make these the live ones; hosts drop all others, and those that hold nothing are let go."""
        if not self._reloadable:
            versions = [replace(version, directory=None) for version in versions]
        self.versions.publish(versions, self._infos())
        self._retain([version.epoch for version in versions])
        with self.changed:
            members = self._membership.members
            leaving = {id for id, m in members.items() if m.stage is Stage.LEAVING} - self._placed()
        self._linger(leaving)
        self._settled(self._placed())

    def _retain(self, epochs: Sequence[int]) -> None:
        """Let hosts drop other epochs; who cannot be reached, twice, is dealt with as dead, by others."""

        def retain(id: str) -> None:
            try:
                members[id][1].retain(*epochs)
            except RaymoeError as error:
                if not is_loss(error):
                    raise
                members[id][1].retain(*epochs)  # it may be the reply that was lost

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

    def _placed(self) -> set[str]:
        current = self.versions.current
        return set() if current is None else set(current.placement.sites)

    def _infos(self) -> Mapping[str, HostInfo]:
        return {id: info for id, (info, _) in self.hosts().items()}


__all__ = ["Elastic", "Shape"]
