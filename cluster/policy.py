"""Decisions to change the number of expert hosts, and to rebalance experts, by measured load. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from cluster.config import AutoscalingSettings
from cluster.placement import Placement, host_loads


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadHistory:
    """What the policy remembers from one measurement to the next.

    Attributes:
        above_since: Time since which the load has been too high; None if it is not.
        below_since: Time since which the load has been too low; None if it is not.
        most_wanted: The most hosts that the load has asked for since `below_since`.
    """

    above_since: float | None = None
    below_since: float | None = None
    most_wanted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMeasurement:
    """A measurement of the expert hosts.

    Attributes:
        now: Time in seconds, by a clock that is never set back.
        utilization: Share of the time since the last measurement that each live host computed, 0 to 1.
        waiting: Rows that wait or are in flight at all hosts together.
        changed_at: Time of the last change of the number of hosts, or attempt at one; None: never.
        history: The history that the last decision returned.
    """

    now: float
    utilization: tuple[float, ...]
    waiting: int = 0
    changed_at: float | None = None
    history: LoadHistory = field(default_factory=LoadHistory)


@dataclass(frozen=True, slots=True)
class NoDecision:
    """A decision to change nothing, and the reason."""

    why: str


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """A decision to scale: the number of hosts and the reason."""

    target: int
    why: str


@dataclass(frozen=True, slots=True)
class RebalanceDecision:
    """A decision to rebalance: the placement and the reason."""

    placement: Placement
    why: str


def autoscale(
    measured: HostMeasurement, settings: AutoscalingSettings
) -> tuple[NoDecision | ScaleDecision, LoadHistory]:
    """The number of hosts that there should be, and the history for the next measurement.

    The wanted number brings the mean utilisation to `target_utilization`, and the rows at each host to
    `target_waiting`. Hosts are added when the load has exceeded its target by `tolerance` for
    `upscale_delay`, and removed when it has been below for `downscale_delay`, down to the most that was
    wanted in that time. A constant load asks for the same number however many hosts there are, and the
    tolerance absorbs noise, so the number of hosts converges.
    """
    hosts = len(measured.utilization)
    wanted, ratio, what = _wanted(measured, settings)
    wanted = min(max(wanted, settings.min_hosts), settings.max_hosts)
    history = _remember(measured, settings, hosts, wanted, ratio)
    resting = _left(measured.changed_at, settings.cooldown, measured.now)
    if resting > 0:
        return NoDecision(f"the last change was too recent: {resting:.1f} s of cooldown left"), history
    if not settings.min_hosts <= hosts <= settings.max_hosts:
        bound = settings.min_hosts if hosts < settings.min_hosts else settings.max_hosts
        target = max(bound, wanted) if hosts < settings.min_hosts else bound
        why = f"{hosts} hosts are not within {settings.min_hosts} to {settings.max_hosts}"
        return ScaleDecision(target, why), LoadHistory()
    if history.above_since is not None:
        if (left := _left(history.above_since, settings.upscale_delay, measured.now)) > 0:
            return NoDecision(f"{what} for too short a time: {left:.1f} s left"), history
        return ScaleDecision(wanted, f"{what} for {settings.upscale_delay:g} s"), LoadHistory()
    if history.below_since is not None:
        if (left := _left(history.below_since, settings.downscale_delay, measured.now)) > 0:
            return NoDecision(f"{what} for too short a time: {left:.1f} s left"), history
        return ScaleDecision(history.most_wanted, f"{what} for {settings.downscale_delay:g} s"), LoadHistory()
    return NoDecision(f"{what}, within bounds and tolerance"), history


def _wanted(measured: HostMeasurement, settings: AutoscalingSettings) -> tuple[int, float, str]:
    """Hosts that the load asks for, load over target at the present hosts, and the load in words."""
    hosts = max(1, len(measured.utilization))
    busy = sum(measured.utilization) / settings.target_utilization
    what = f"utilization is {sum(measured.utilization) / hosts:.2f} (target {settings.target_utilization:g})"
    rows = 0.0 if settings.target_waiting is None else measured.waiting / settings.target_waiting
    if rows > busy:
        what = f"{measured.waiting / hosts:.0f} rows are at each host (target {settings.target_waiting:g})"
    # Rounding must not ask for another host when the load is exactly on target.
    return math.ceil(max(busy, rows) - 1e-9), max(busy, rows) / hosts, what


def _remember(
    measured: HostMeasurement, settings: AutoscalingSettings, hosts: int, wanted: int, ratio: float
) -> LoadHistory:
    """The history with this measurement; a load back at its target resets it."""
    before = measured.history
    if wanted > hosts and ratio > 1 + settings.tolerance:
        since = measured.now if before.above_since is None else before.above_since
        return LoadHistory(above_since=since)
    if wanted < hosts and ratio < 1 - settings.tolerance:
        if before.below_since is None:
            return LoadHistory(below_since=measured.now, most_wanted=wanted)
        return LoadHistory(below_since=before.below_since, most_wanted=max(before.most_wanted, wanted))
    return LoadHistory()


def _left(since: float | None, delay: float, now: float) -> float:
    """Seconds until `delay` seconds have passed since `since`."""
    return 0.0 if since is None else since + delay - now


def needs_rebalance(
    loads: ArrayLike,
    placement: Placement,
    threshold: float,
    replan: Callable[[], Placement],
    *,
    margin: float = 0.05,
) -> NoDecision | RebalanceDecision:
    """Whether experts should be placed again: the hosts are out of balance, and a new placement is better.

    Args:
        loads: `[L, E]` measured load.
        placement: The present placement.
        threshold: Balancedness below which experts may move.
        replan: Computes the new placement; called only below the threshold.
        margin: Gain in balancedness that makes the moves worthwhile, as a share of the present one.
    """
    now = total_balancedness(placement, loads)
    if now >= threshold:
        return NoDecision(f"balancedness is {now:.3f}, not below {threshold:g}")
    better = replan()
    then = total_balancedness(better, loads)
    if then <= now * (1 + margin):
        return NoDecision(f"balancedness is {now:.3f}, but a new placement would only reach {then:.3f}")
    return RebalanceDecision(better, f"balancedness is {now:.3f}, and would be {then:.3f}")


def total_balancedness(placement: Placement, loads: ArrayLike) -> float:
    """Mean over highest load of the hosts, each summed over the layers, which run one after the other."""
    found = host_loads(placement, loads)
    highest = float(found.max(axis=1, initial=0.0).sum())
    return float(found.mean(axis=1).sum()) / highest if highest > 0 else 1.0


__all__ = [
    "HostMeasurement",
    "LoadHistory",
    "NoDecision",
    "RebalanceDecision",
    "ScaleDecision",
    "autoscale",
    "needs_rebalance",
    "total_balancedness",
]
