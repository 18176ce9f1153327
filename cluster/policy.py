"""When to change the number of expert hosts, and when to place experts anew: decisions as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from numpy.typing import ArrayLike

from cluster.config import AutoscalingSettings
from cluster.placement import Placement, host_loads


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the policy remembers from one look to the next.

    Attributes:
        above_since: since when the load has been too high, in seconds; None: it is not.
        below_since: since when it has been too low; None: it is not.
        most_wanted: most hosts that the load has wanted since `below_since`.
    """

    above_since: float | None = None
    below_since: float | None = None
    most_wanted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Expert hosts at one moment.

    Attributes:
        now: seconds, by a clock that never goes back.
        utilization: of each live host, the share of the time since the last look that it computed, 0 to 1.
        waiting: rows that wait or are in flight, at all hosts together.
        changed_at: when the number of hosts last changed, or was last tried to change; None: never.
        history: what the last decision came with.
    """

    now: float
    utilization: tuple[float, ...]
    waiting: int = 0
    changed_at: float | None = None
    history: History = field(default_factory=History)


@dataclass(frozen=True, slots=True)
class NoDecision:
    """Everything stays as it is; why."""

    why: str


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """There should be `target` hosts; why."""

    target: int
    why: str


@dataclass(frozen=True, slots=True)
class RebalanceDecision:
    """Experts should be placed like this; why."""

    placement: Placement
    why: str


def autoscale(
    snapshot: Snapshot, settings: AutoscalingSettings
) -> tuple[NoDecision | ScaleDecision, History]:
    """How many hosts there should be, and what to remember for the next look.

    Wanted are as many hosts as make the mean utilisation `target_utilization`, and the rows at each
    `target_waiting`. More come when the load has been above its target by `tolerance` for
    `upscale_delay`, fewer when below for `downscale_delay` (then as many as were wanted at most in that
    time). Load that does not change wants one number of hosts however many there are, and the tolerance
    keeps noise from wanting another: the number of hosts comes to rest.
    """
    hosts = len(snapshot.utilization)
    wanted, ratio, what = _wanted(snapshot, settings)
    wanted = min(max(wanted, settings.min_hosts), settings.max_hosts)
    history = _remember(snapshot, settings, hosts, wanted, ratio)
    resting = _left(snapshot.changed_at, settings.cooldown, snapshot.now)
    if resting > 0:
        return NoDecision(f"the last change was too recent: {resting:.1f} s of cooldown left"), history
    if not settings.min_hosts <= hosts <= settings.max_hosts:
        bound = settings.min_hosts if hosts < settings.min_hosts else settings.max_hosts
        target = max(bound, wanted) if hosts < settings.min_hosts else bound
        why = f"{hosts} hosts are not within {settings.min_hosts} to {settings.max_hosts}"
        return ScaleDecision(target, why), History()
    if history.above_since is not None:
        if (left := _left(history.above_since, settings.upscale_delay, snapshot.now)) > 0:
            return NoDecision(f"{what} for too short a time: {left:.1f} s left"), history
        return ScaleDecision(wanted, f"{what} for {settings.upscale_delay:g} s"), History()
    if history.below_since is not None:
        if (left := _left(history.below_since, settings.downscale_delay, snapshot.now)) > 0:
            return NoDecision(f"{what} for too short a time: {left:.1f} s left"), history
        return ScaleDecision(history.most_wanted, f"{what} for {settings.downscale_delay:g} s"), History()
    return NoDecision(f"{what}, within bounds and tolerance"), history


def _wanted(snapshot: Snapshot, settings: AutoscalingSettings) -> tuple[int, float, str]:
    """Hosts that the load wants, load over target at the hosts that there are, and the load in words."""
    hosts = max(1, len(snapshot.utilization))
    busy = sum(snapshot.utilization) / settings.target_utilization
    what = f"utilization is {sum(snapshot.utilization) / hosts:.2f} (target {settings.target_utilization:g})"
    rows = 0.0 if settings.target_waiting is None else snapshot.waiting / settings.target_waiting
    if rows > busy:
        what = f"{snapshot.waiting / hosts:.0f} rows are at each host (target {settings.target_waiting:g})"
    # Rounding must not want another host for a load that is exactly on target.
    return math.ceil(max(busy, rows) - 1e-9), max(busy, rows) / hosts, what


def _remember(
    snapshot: Snapshot, settings: AutoscalingSettings, hosts: int, wanted: int, ratio: float
) -> History:
    """The history with this look added; a load back at its target ends what has begun."""
    before = snapshot.history
    if wanted > hosts and ratio > 1 + settings.tolerance:
        since = snapshot.now if before.above_since is None else before.above_since
        return History(above_since=since)
    if wanted < hosts and ratio < 1 - settings.tolerance:
        if before.below_since is None:
            return History(below_since=snapshot.now, most_wanted=wanted)
        return History(below_since=before.below_since, most_wanted=max(before.most_wanted, wanted))
    return History()


def _left(since: float | None, delay: float, now: float) -> float:
    """Seconds until `delay` has passed."""
    return 0.0 if since is None else since + delay - now


def needs_rebalance(
    loads: ArrayLike,
    placement: Placement,
    threshold: float,
    replan: Callable[[], Placement],
    *,
    margin: float = 0.05,
) -> NoDecision | RebalanceDecision:
    """Whether experts should be placed anew: the hosts are out of balance, and a new placement helps.

    Layers run one after the other, so balancedness is their mean loads over their highest, summed.

    Args:
        loads: `[L, E]` measured load.
        threshold: balancedness below which something should happen.
        replan: the placement that there would be; asked only below the threshold.
        margin: by how much its balancedness must exceed the present one, as a share of it.
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
    """Mean over highest load of the hosts, for all layers one after the other."""
    found = host_loads(placement, loads)
    highest = float(found.max(axis=1, initial=0.0).sum())
    return float(found.mean(axis=1).sum()) / highest if highest > 0 else 1.0


__all__ = [
    "History",
    "NoDecision",
    "RebalanceDecision",
    "ScaleDecision",
    "Snapshot",
    "autoscale",
    "needs_rebalance",
    "total_balancedness",
]
