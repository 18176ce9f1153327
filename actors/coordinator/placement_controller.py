"""Keeps experts on the hosts where they should be while hosts join, leave and die: one change at a time.

A change plans a placement on the hosts that should hold experts, has every host assemble its part under a new
epoch beside what it holds, publishes the routing table, and has the hosts drop the old epoch. A change that
fails before the table is published has no effect: hosts that do not answer are declared dead, and the next
attempt plans without them.

Locks: `_changing` is held by a change until its end. While it is held, the roster's `changed` and the lock of
the published tables are taken for moments, one at a time; no call to a host is made with either of them held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from numpy.typing import ArrayLike

from actors.coordinator.host_roster import HostRoster
from actors.coordinator.transfer_plan import PlacementSpec, TransferPlan, arrivals, no_sources
from actors.coordinator.version_installer import VersionInstaller
from actors.messages.coordinator_state import PlacedWeights
from cluster.placement import Holding, Placement, Site, plan
from errors import ChannelError, HostsChanged, RaymoeError, ResourceError

_T = TypeVar("_T")
_ATTEMPTS = 5


class PlacementController:
    """Changes which hosts hold which experts. Any thread may call.

    Args:
        roster: The hosts.
        spec: What is placed.
        reloadable: Whether experts that no host holds can be read again from the version's directory: in
            serving, but not in training, where the experts have changed since.

    Attributes:
        published: Versions of the weights that the hosts hold.
        reloads: Number of times that other weights came into use.
    """

    def __init__(self, roster: HostRoster, spec: PlacementSpec, *, reloadable: bool = True) -> None:
        self.roster, self.spec = roster, spec
        self.published = roster.published
        self.reloads = 0
        self._installer = VersionInstaller(roster, spec.layers, reloadable=reloadable)
        self._reloadable = reloadable
        self._changing = threading.Lock()
        self._loaded: PlacedWeights | None = None
        self._loads: ArrayLike | None = None
        self._rebalance_reason: str | None = None
        self._remembered: Holding | None = None

    def held(self) -> Holding | None:
        """Experts of the version in use on each host, or as an earlier coordinator knew; None if unknown."""
        current = self.published.current
        return self._remembered if current is None else current.placement.holding()

    def remember(self, placement: Placement) -> None:
        """Take what hosts held under an earlier coordinator into account in the first placement."""
        self._remembered = placement.holding()

    def plan_by_loads(self, loads: ArrayLike) -> Placement:
        """The placement that these loads, `[L, E]`, ask for on the live hosts."""
        return self.plan(self.roster.sites(), self.held(), loads)

    def plan(self, sites: Sequence[Site], held: Holding | None, loads: ArrayLike | None = None) -> Placement:
        """A placement on these hosts, by the loads measured last unless given."""
        return plan(
            sites,
            n_layers=len(self.spec.layers),
            n_experts=self.spec.n_experts,
            n_group=self.spec.n_group,
            replicas=self.spec.replicas,
            redundant=self.spec.redundant,
            loads=self._loads if loads is None else loads,
            held=held,
        )

    def begin(
        self, name: str, directory: str, *, step: int | None = None, moments: bool = False, timeout: float = 0
    ) -> None:
        """Place all experts for the first time; does nothing if they are placed.

        Args:
            name: Name of the weights.
            directory: Where hosts read them.
            step: In training, the step of the weights.
            moments: Whether the directory has the optimizer's moments too.
            timeout: Seconds to wait for a host.

        Raises:
            RaymoeError: A host failed, or there is none.
        """

        def attempt() -> None:
            placement = self.plan(self.roster.await_sites(timeout), self._remembered)
            version = PlacedWeights(
                name=name, epoch=self.published.next_epoch(), directory=directory, placement=placement
            )
            self._install(TransferPlan(version=version, sources=no_sources(placement), moments=moments), step)

        with self._changing:
            if self.published.current is None:
                self._retry_without_the_dead("the first placement", attempt)

    def epochs_held(self) -> dict[str, set[int]]:
        """Host id -> epochs of the experts that it holds; hosts that do not answer are declared dead."""
        self.roster.probe_all("a coordinator began")
        found: dict[str, set[int]] = {}
        for id, (_, host) in self.roster.hosts().items():
            try:
                stats = host.stats()
            except RaymoeError:  # dead since the probe, as its next ping will show
                continue
            found[id] = set(stats.epochs) if stats.experts or len(stats.epochs) > 1 else set()
        return found

    def adopt(self, versions: Sequence[PlacedWeights], held: Mapping[str, set[int]]) -> None:
        """Publish the versions of an earlier coordinator as far as hosts still hold them.

        Args:
            held: Host id -> epochs that it holds.
        """
        left = []
        for version in versions:
            placement = version.placement
            for site in placement.sites:
                if version.epoch not in held.get(site, ()):
                    placement = placement.without(site)
            if placement.sites:
                left.append(replace(version, placement=placement))
        if not left:
            return
        with self._changing:
            self.published.publish(left, self.roster.infos())
            self._installer.retain([version.epoch for version in left])
        self.roster.record_holders(self._installer.placed())

    def due(self) -> str | None:
        """Why experts have to move; None when they are where they should be."""
        self.roster.record_holders(self._installer.placed())
        sites = {site.id for site in self.roster.sites()}
        current = self.published.current
        if current is None or not sites:
            return None
        there = set(current.placement.sites)
        if sites - there:
            return f"{', '.join(sorted(sites - there))} joined"
        if there - sites:
            return f"{', '.join(sorted(there - sites))} leaves"
        copies = min(self.spec.replicas, len(sites))
        if any(len(ids) < copies for row in current.placement.holders for ids in row):
            return "experts lack a replica"
        return self._rebalance_reason

    def rebalance(self, why: str, loads: ArrayLike) -> None:
        """Make a change due that places the experts by these loads, `[L, E]`; later plans use them too."""
        with self.roster.changed:
            self._loads, self._rebalance_reason = loads, why
            self.roster.changed.notify_all()

    def reshape(self, why: str, *, step: int | None = None) -> float:
        """Move the experts to where they should be; returns the seconds that it took.

        Args:
            why: The reason, for the event.
            step: In training, the step that the hosts' state is for; no step may be under way.

        Raises:
            RaymoeError: It failed, and nothing has changed.
        """
        with self._changing:
            began, self._rebalance_reason = time.monotonic(), None
            try:
                moved = self._retry_without_the_dead(f"moving experts ({why})", lambda: self._reshape(step))
            except RaymoeError as error:
                self.roster.note("failed", f"moving experts ({why}): {error}")
                raise
            seconds = time.monotonic() - began
            self.roster.note("moved", f"{moved} experts in {seconds:.2f} s, since {why}")
            return seconds

    def install(self, transfers: TransferPlan, *, step: int | None = None) -> None:
        """Have the hosts assemble a version, and publish it as the only one.

        Args:
            step: In training, the step that the state is for.

        Raises:
            RaymoeError: A host failed; nothing has been published.
        """
        with self._changing:
            self._install(transfers, step)

    def load(self, directory: str, name: str) -> int:
        """Have every host load other weights beside those in use, placed as these are; returns their epoch.

        Raises:
            RaymoeError: A host failed; the others have dropped the weights.
        """

        def attempt() -> PlacedWeights:
            current = self.published.current
            if current is None:
                raise ResourceError("no experts are served yet; wait until they are")
            placement = current.placement
            version = PlacedWeights(
                name=name, epoch=self.published.next_epoch(), directory=directory, placement=placement
            )
            transfers = TransferPlan(version=version, sources=no_sources(placement))
            self._installer.assemble([transfers], None, "load the weights")
            return version

        with self._changing:
            self._loaded = self._retry_without_the_dead("loading other weights", attempt)
            return self._loaded.epoch

    def publish(self, epoch: int) -> None:
        """Publish the weights that were loaded last, beside the published ones.

        Raises:
            HostsChanged: Nothing is loaded under this epoch, or a host that holds it is gone.
        """
        with self._changing:
            current, version, infos = self.published.current, self._loaded, self.roster.infos()
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
            self.published.publish([*self.published.live, version], infos)
            self.reloads += 1
            self.roster.note("reloaded", f"the weights {version.name} in place of {current.name}")

    def retire(self, keep: str = "") -> None:
        """Drop all versions but the one of this name, or without such a one but the version in use."""
        with self._changing:
            self._loaded = None
            live = {version.name: version for version in self.published.live}
            kept = live.get(keep, self.published.current)
            if kept is not None:
                self._installer.publish([kept])

    def _retry_without_the_dead(self, what: str, attempt: Callable[[], _T]) -> _T:
        """Repeat a change as long as it fails because hosts die during it."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return attempt()
            except RaymoeError as error:
                if not self.roster.probe_all(f"{what} failed: {error}"):
                    raise
        return attempt()

    def _reshape(self, step: int | None) -> int:
        """One attempt to move the experts; returns how many experts hosts had to fetch."""
        sites, live = self.roster.sites(), self.published.live
        if not sites:
            raise ResourceError("there is no expert host")
        if not self._reloadable and not all(version.placement.complete for version in live):
            raise ChannelError("experts are lost; the run has to go back to what is kept of them")
        self._loaded = None  # placed on other hosts than those from now on
        transfers, moved = [], 0
        for version in live:
            held = version.placement.holding()
            placement = self.plan(sites, held)
            new = replace(version, epoch=self.published.next_epoch(), placement=placement)
            transfers.append(TransferPlan(version=new, sources=version.placement.holders, base=version.epoch))
            moved += arrivals(placement, held)
        self._installer.assemble(transfers, step)
        self._installer.publish([one.version for one in transfers])
        return moved

    def _install(self, transfers: TransferPlan, step: int | None) -> None:
        self._loaded = None
        self._installer.assemble([transfers], step)
        self._installer.publish([transfers.version])


__all__ = ["PlacementController"]
