"""Measures the expert hosts' load, and scales the hosts or rebalances the experts by it.

`cluster.policy` decides what follows from the measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from actors.coordinator.placement_controller import PlacementController
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.host_control import HostStats
from cluster.config import AutoscalingSettings
from cluster.placement import Placement
from cluster.policy import (
    HostMeasurement,
    LoadHistory,
    NoDecision,
    RebalanceDecision,
    ScaleDecision,
    autoscale,
    needs_rebalance,
    total_balancedness,
)
from errors import RaymoeError

_LEAST_PER_EXPERT = 64  # rows that an expert computes on average before loads are compared


class Autoscaler:
    """Changes the number of hosts by their load. `look` is called about every second.

    Args:
        placements: The hosts and what they hold.
        settings: When the number of hosts changes.
        clock: Seconds; never set back.

    Attributes:
        last: The latest decision.
    """

    def __init__(
        self,
        placements: PlacementController,
        settings: AutoscalingSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._placements, self._settings, self._clock = placements, settings, clock
        self._roster = placements.roster
        self._before: tuple[float, Mapping[str, float]] = (clock(), {})
        self._changed_at: float | None = None
        self._history = LoadHistory()
        self.last: NoDecision | ScaleDecision = NoDecision("the hosts have not been measured yet")

    def look(self) -> NoDecision | ScaleDecision:
        """Measure the hosts, decide, and scale them by the decision, which is returned."""
        now, stats = self._clock(), self._stats()
        then, busy = self._before
        self._before = (now, {id: one.busy_seconds for id, one in stats.items()})
        self.last = self._decide(now, now - then, stats, busy)
        if isinstance(self.last, ScaleDecision):
            self._changed_at = now
            try:
                self._roster.scale(self.last.target, why=self.last.why)
            except RaymoeError as error:
                self._roster.note("failed", f"autoscaling to {self.last.target} expert hosts: {error}")
        return self.last

    def _decide(
        self, now: float, seconds: float, stats: Mapping[str, HostStats], busy: Mapping[str, float]
    ) -> NoDecision | ScaleDecision:
        scaling = self._roster.scaling
        if scaling is not None and scaling.ended is None and scaling.failure is None:
            self._changed_at, self._history = now, LoadHistory()
            return NoDecision(f"the change to {scaling.target} expert hosts is under way")
        shares = tuple(
            min(1.0, max(0.0, (one.busy_seconds - busy[id]) / seconds))
            for id, one in stats.items()
            if id in busy and seconds > 0
        )
        if not shares:
            return NoDecision("no host has been measured twice yet")
        decision, self._history = autoscale(
            HostMeasurement(
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
        """Statistics of the hosts that hold experts and answer."""
        current = self._placements.published.current
        placed = set() if current is None else set(current.placement.sites)
        found = {}
        for id, (_, control) in self._roster.hosts().items():
            if id in placed:
                with suppress(RaymoeError):
                    found[id] = control.stats()
        return found


class Rebalancer:
    """Requests a new placement when the hosts' loads are out of balance. `look` is called about every second.

    Args:
        placements: The hosts and what they hold.
        threshold: Balancedness below which experts are placed again; None places only redundant replicas,
            which needs measured loads.
        least: Rows that an expert computes on average before anything is decided.

    Attributes:
        balancedness: The latest measurement; None before the first one.
    """

    def __init__(
        self, placements: PlacementController, threshold: float | None, *, least: int = _LEAST_PER_EXPERT
    ) -> None:
        self._placements, self._threshold, self._least = placements, threshold, least
        self._epoch: int | None = None
        self._before: dict[str, NDArray[np.int64]] = {}
        self.balancedness: float | None = None

    def look(self) -> NoDecision | RebalanceDecision:
        """Measure the hosts, decide, and request a rebalance by the decision, which is returned."""
        current = self._placements.published.current
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
            loads, current.placement, threshold, lambda: self._placements.plan_by_loads(measured)
        )
        if isinstance(decision, RebalanceDecision):
            self._placements.rebalance(decision.why, loads)
        return decision

    def _since(self, current: PlacedWeights) -> NDArray[np.int64] | None:
        """`[L, E]` rows computed since the first look at the current placement; None at that look."""
        now: dict[str, NDArray[np.int64]] = {}
        for id, (_, control) in self._placements.roster.hosts().items():
            with suppress(RaymoeError):
                now[id] = np.array(control.loads().numpy(), dtype=np.int64)  # a copy
        if self._epoch != current.epoch:
            self._epoch, self._before = current.epoch, now
            return None
        deltas = [loads - self._before[id] for id, loads in now.items() if id in self._before]
        return np.sum(deltas, axis=0, dtype=np.int64) if deltas else None

    def _lacks_redundant(self, placement: Placement) -> bool:
        """Whether redundant replicas are wanted and none is placed."""
        spec, sites = self._placements.spec, len(placement.sites)
        most = max((len(ids) for row in placement.holders for ids in row), default=0)
        return spec.redundant > 0 and most <= min(spec.replicas, sites) < sites


__all__ = ["Autoscaler", "Rebalancer"]
