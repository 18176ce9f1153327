"""Autoscaling and rebalancing: the decisions, their times, and that they converge."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import AutoscalingSettings
from cluster.placement import Placement, Site, balancedness, plan
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

SETTINGS = AutoscalingSettings(min_hosts=1, max_hosts=8)


@st.composite
def autoscaling(draw: st.DrawFn) -> AutoscalingSettings:
    least = draw(st.integers(1, 5))
    target = draw(st.floats(0.1, 0.8))
    return AutoscalingSettings(
        min_hosts=least,
        max_hosts=draw(st.integers(least, 12)),
        target_utilization=target,
        target_waiting=draw(st.none() | st.floats(1, 100)),
        tolerance=draw(st.floats(0, min(0.5, 0.99 / target - 1))),
        upscale_delay=draw(st.floats(0, 20)),
        downscale_delay=draw(st.floats(0, 50)),
        cooldown=draw(st.floats(0, 20)),
    )


def simulate(
    chosen: AutoscalingSettings, hosts: int, work: list[float], rows: float, tick: float = 1.0
) -> list[tuple[float, int, int]]:
    """Changes (when, from, to) of hosts that share `work[t]` hosts' worth of work at tick t."""
    history, changed, found = LoadHistory(), None, []
    for at, load in enumerate(work):
        now = at * tick
        measured = HostMeasurement(
            now=now,
            utilization=(min(1.0, load / hosts),) * hosts,
            waiting=int(rows),
            changed_at=changed,
            history=history,
        )
        decision, history = autoscale(measured, chosen)
        assert decision.why
        if isinstance(decision, ScaleDecision):
            assert decision.target != hosts
            assert chosen.min_hosts <= decision.target <= chosen.max_hosts
            assert changed is None or now - changed >= chosen.cooldown
            found.append((now, hosts, decision.target))
            hosts, changed = decision.target, now
    return found


@given(autoscaling(), st.integers(1, 14), st.floats(0, 12), st.floats(0, 1000))
@settings(deadline=None)
def test_constant_load_comes_to_rest_without_turning_back(
    chosen: AutoscalingSettings, hosts: int, work: float, rows: float
) -> None:
    changes = simulate(chosen, hosts, [work] * 600, rows)
    inside = [
        (before, after) for _, before, after in changes if chosen.min_hosts <= before <= chosen.max_hosts
    ]
    assert len({after > before for before, after in inside}) <= 1, "it went up and down"
    # Each step up of saturated hosts is by 1 / target at least; the delays decide how long it takes.
    assert not [when for when, _, _ in changes if when > 400]


@given(st.integers(1, 8), st.floats(0.2, 7), st.floats(0, 0.04), st.integers(0, 10**6))
@settings(deadline=None)
def test_load_with_noise_within_the_tolerance_comes_to_rest(
    hosts: int, work: float, noise: float, seed: int
) -> None:
    chosen = SETTINGS.model_copy(update={"max_hosts": 16, "downscale_delay": 5.0})
    random = np.random.default_rng(seed)
    changes = simulate(chosen, hosts, (work * random.uniform(1 - noise, 1 + noise, 600)).tolist(), 0)
    ups = [after > before for _, before, after in changes]
    # A peak at the time of a decision may add one host too many, which is removed again.
    assert sum(one != other for one, other in pairwise(ups)) <= 1


@given(autoscaling(), st.data())
@settings(deadline=None)
def test_any_load_keeps_bounds_and_cooldown(chosen: AutoscalingSettings, data: st.DataObject) -> None:
    work = data.draw(st.lists(st.floats(0, 14), min_size=1, max_size=80))
    simulate(chosen, data.draw(st.integers(1, 14)), work, data.draw(st.floats(0, 1000)))


@given(autoscaling(), st.integers(1, 12), st.floats(0, 12))
@settings(deadline=None)
def test_reacts_within_its_delays(chosen: AutoscalingSettings, hosts: int, work: float) -> None:
    chosen = chosen.model_copy(update={"target_waiting": None})
    hosts = min(max(hosts, chosen.min_hosts), chosen.max_hosts)
    ratio = min(1.0, work / hosts) / chosen.target_utilization
    wanted = min(max(math.ceil(ratio * hosts - 1e-9), chosen.min_hosts), chosen.max_hosts)
    changes = simulate(chosen, hosts, [work] * 120, 0)
    if wanted > hosts and ratio > 1 + chosen.tolerance + 1e-6:
        assert chosen.upscale_delay <= changes[0][0] <= chosen.upscale_delay + 1
        assert changes[0][2] == wanted
    elif wanted < hosts and ratio < 1 - chosen.tolerance - 1e-6:
        assert chosen.downscale_delay <= changes[0][0] <= chosen.downscale_delay + 1
        assert changes[0][2] == wanted
    elif wanted == hosts:
        assert not changes


def look(utilization: tuple[float, ...], now: float = 100.0, **rest: object) -> HostMeasurement:
    return HostMeasurement(now=now, utilization=utilization, **rest)  # type: ignore[arg-type]


def test_a_short_peak_changes_nothing() -> None:
    _, history = autoscale(look((0.9, 0.9)), SETTINGS)
    assert history.above_since == 100
    _, history = autoscale(look((0.6, 0.6), 103, history=history), SETTINGS)
    assert history == LoadHistory()
    decision, _ = autoscale(look((0.9, 0.9), 106, history=history), SETTINGS)
    assert decision == NoDecision("utilization is 0.90 (target 0.6) for too short a time: 5.0 s left")


def test_waiting_rows_want_hosts_though_utilization_does_not() -> None:
    chosen = SETTINGS.model_copy(update={"target_waiting": 10.0, "upscale_delay": 0.0})
    decision, _ = autoscale(look((0.2, 0.2), waiting=45), chosen)
    assert decision == ScaleDecision(5, "22 rows are at each host (target 10) for 0 s")


def test_fewer_hosts_are_as_many_as_were_wanted_at_most_while_load_was_low() -> None:
    history = LoadHistory()
    for now, busy in ((0.0, 0.1), (30.0, 0.3), (60.0, 0.1)):
        decision, history = autoscale(look((busy,) * 6, now, history=history), SETTINGS)
    assert decision == ScaleDecision(3, "utilization is 0.10 (target 0.6) for 60 s")


def test_hosts_outside_the_bounds_come_back_at_once_but_for_the_cooldown() -> None:
    chosen = SETTINGS.model_copy(update={"min_hosts": 3})
    decision, _ = autoscale(look((0.1,)), chosen)
    assert decision == ScaleDecision(3, "1 hosts are not within 3 to 8")
    decision, _ = autoscale(look((0.1,) * 9), chosen)
    assert decision == ScaleDecision(8, "9 hosts are not within 3 to 8")
    decision, _ = autoscale(look((0.1,), changed_at=95.0), chosen)
    assert decision == NoDecision("the last change was too recent: 5.0 s of cooldown left")
    decision, _ = autoscale(look(()), chosen)
    assert isinstance(decision, ScaleDecision)
    assert decision.target == 3


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"max_hosts\n.*at least min_hosts"):
        AutoscalingSettings(min_hosts=5)
    with pytest.raises(ValidationError, match=r"tolerance\n.*no utilisation that is too high"):
        AutoscalingSettings(target_utilization=0.95)


def test_rebalances_below_the_threshold_when_it_helps() -> None:
    sites = [Site("a", "n"), Site("b", "m")]
    shape = {"n_layers": 1, "n_experts": 4, "n_group": 1}
    placement = plan(sites, **shape)
    loads = [[3.0, 3.0, 1.0, 1.0]]
    better = plan(sites, **shape, loads=loads, held=placement.holding())
    assert total_balancedness(placement, loads) == balancedness(placement, loads)[0] == 4 / 6

    def must_not_be_asked() -> Placement:
        raise AssertionError

    decision = needs_rebalance(loads, placement, 0.9, lambda: better)
    assert decision == RebalanceDecision(better, "balancedness is 0.667, and would be 1.000")
    assert isinstance(needs_rebalance(loads, placement, 0.6, must_not_be_asked), NoDecision)
    assert isinstance(needs_rebalance(loads, better, 0.9, must_not_be_asked), NoDecision)
    assert isinstance(needs_rebalance(loads, placement, 0.9, lambda: placement), NoDecision)
    assert isinstance(needs_rebalance(loads, placement, 0.9, lambda: better, margin=0.6), NoDecision)
    assert isinstance(needs_rebalance(np.zeros((1, 4)), placement, 0.9, must_not_be_asked), NoDecision)
