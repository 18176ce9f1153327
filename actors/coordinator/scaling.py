"""Measures the expert hosts, and acts on it: more or fewer of them, experts elsewhere.

What follows from the measurements is decided by `cluster.policy`; here they are taken, and carried out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actors.coordinator.routing_tables import Published
from actors.coordinator.transfer_plan import Shape
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.steps import HostControl, HostStats
from cluster.config import AutoscalingSettings
from cluster.membership import Scaling
from cluster.placement import Placement
from cluster.policy import (
    History,
    NoDecision,
    RebalanceDecision,
    ScaleDecision,
    Snapshot,
    autoscale,
    needs_rebalance,
    total_balancedness,
)
from cluster.topology import HostInfo
from errors import RaymoeError

_LEAST_PER_EXPERT = 64  # rows of every expert, on average, before their loads say anything


class Scalable(Protocol):
    """What the measuring needs of `actors.coordinator.placement_changes.Elastic`."""

    versions: Published
    shape: Shape

    def hosts(self) -> dict[str, tuple[HostInfo, HostControl]]: ...

    @property
    def scaling(self) -> Scaling | None: ...

    def scale(self, target: int, *, why: str = "") -> Scaling: ...

    def note(self, kind: str, text: str) -> None: ...

    def rebalance(self, why: str, loads: ArrayLike) -> None: ...

    def replanned(self, loads: ArrayLike) -> Placement: ...


class Autoscaler:
    """Changes the number of hosts by load; to be told to `look` every second or so.

    Args:
        clock: seconds; never set back.
    """

    def __init__(
        self,
        hosts: Scalable,
        settings: AutoscalingSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts, self._settings, self._clock = hosts, settings, clock
        self._before: tuple[float, Mapping[str, float]] = (clock(), {})
        self._changed_at: float | None = None
        self._history = History()
        self.last: NoDecision | ScaleDecision = NoDecision("the hosts have not been measured yet")

    def look(self) -> NoDecision | ScaleDecision:
        """Measure, decide, and scale; what was decided."""
        now, stats = self._clock(), self._stats()
        then, busy = self._before
        self._before = (now, {id: one.busy_seconds for id, one in stats.items()})
        self.last = self._decide(now, now - then, stats, busy)
        if isinstance(self.last, ScaleDecision):
            self._changed_at = now
            try:
                self._hosts.scale(self.last.target, why=self.last.why)
            except RaymoeError as error:
                self._hosts.note("failed", f"autoscaling to {self.last.target} expert hosts: {error}")
        return self.last

    def _decide(
        self, now: float, seconds: float, stats: Mapping[str, HostStats], busy: Mapping[str, float]
    ) -> NoDecision | ScaleDecision:
        scaling = self._hosts.scaling
        if scaling is not None and scaling.ended is None and scaling.failure is None:
            self._changed_at, self._history = now, History()
            return NoDecision(f"the change to {scaling.target} expert hosts is under way")
        shares = tuple(
            min(1.0, max(0.0, (one.busy_seconds - busy[id]) / seconds))
            for id, one in stats.items()
            if id in busy and seconds > 0
        )
        if not shares:
            return NoDecision("no host has been measured twice yet")
        decision, self._history = autoscale(
            Snapshot(
                now=now,
                utilization=shares,
                waiting=sum(one.in_flight for one in stats.values()),
                changed_at=self._changed_at,
                history=self._history,
            ),
            self._settings,
        )
        return decision

    def _stats(self) -> dict[str, HostStats]:
        """Of the hosts that hold experts, and answer."""
        current = self._hosts.versions.current
        placed = set() if current is None else set(current.placement.sites)
        found = {}
        for id, (_, control) in self._hosts.hosts().items():
            if id in placed:
                with suppress(RaymoeError):
                    found[id] = control.stats()
        return found


class Rebalancer:
    """Wants experts placed anew when hosts are out of balance; to be told to `look` now and then.

    Args:
        threshold: balancedness below which they are; None looks after redundant experts alone, which
            can only be placed once loads have been measured.
        least: rows of every expert, on average, before anything is decided.
    """

    def __init__(self, hosts: Scalable, threshold: float | None, *, least: int = _LEAST_PER_EXPERT) -> None:
        self._hosts, self._threshold, self._least = hosts, threshold, least
        self._epoch: int | None = None
        self._before: dict[str, NDArray[np.int64]] = {}
        self.balancedness: float | None = None

    def look(self) -> NoDecision | RebalanceDecision:
        """Measure, decide, and say so to the hosts; what was decided."""
        current = self._hosts.versions.current
        if current is None:
            return NoDecision("no experts are placed yet")
        loads = self._since(current)
        if loads is None or loads.sum() < self._least * loads.size:
            return NoDecision("too few rows have been computed since experts were last placed")
        self.balancedness = total_balancedness(current.placement, loads)
        threshold = self._threshold
        if threshold is None or self._lacks_redundant(current.placement):
            if not self._lacks_redundant(current.placement):
                return NoDecision(f"balancedness is {self.balancedness:.3f}, and no threshold is set")
            threshold = 1.0
        measured = loads
        decision = needs_rebalance(
            loads, current.placement, threshold, lambda: self._hosts.replanned(measured)
        )
        if isinstance(decision, RebalanceDecision):
            self._hosts.rebalance(decision.why, loads)
        return decision

    def _since(self, current: PlacedWeights) -> NDArray[np.int64] | None:
        """`[L, E]` rows computed since the current placement was first seen."""
        now: dict[str, NDArray[np.int64]] = {}
        for id, (_, control) in self._hosts.hosts().items():
            with suppress(RaymoeError):
                now[id] = np.array(control.loads().numpy(), dtype=np.int64)  # a copy
        if self._epoch != current.epoch:
            self._epoch, self._before = current.epoch, now
            return None
        deltas = [loads - self._before[id] for id, loads in now.items() if id in self._before]
        return np.sum(deltas, axis=0, dtype=np.int64) if deltas else None

    def _lacks_redundant(self, placement: Placement) -> bool:
        shape, sites = self._hosts.shape, len(placement.sites)
        most = max((len(ids) for row in placement.holders for ids in row), default=0)
        return shape.redundant > 0 and most <= min(shape.replicas, sites) < sites


__all__ = ["Autoscaler", "Rebalancer", "Scalable"]
