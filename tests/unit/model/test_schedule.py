"""Schedules as the configuration reads them, and the shape of the learning rate."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from model.optimizers.schedule import Point, Schedule, learning_rate, value_at

ADAPTER: TypeAdapter[float | tuple[Point, ...]] = TypeAdapter(Schedule)


def test_a_number_is_constant() -> None:
    schedule = ADAPTER.validate_python(0.3)
    assert value_at(schedule, 0) == value_at(schedule, 10**9) == 0.3


def test_points_hold_until_the_next() -> None:
    schedule = ADAPTER.validate_python([{"step": 0, "value": 0.3}, {"step": 5, "value": 0.1}])
    assert [value_at(schedule, s) for s in (0, 4, 5, 6, 1000)] == [0.3, 0.3, 0.1, 0.1, 0.1]
    assert ADAPTER.validate_json(ADAPTER.dump_json(schedule)) == schedule


@pytest.mark.parametrize(
    "given",
    [
        [],
        [{"step": 3, "value": 1}],
        [{"step": 0, "value": 1}, {"step": 0, "value": 2}],
        [{"step": 0, "value": 1}, {"step": 9, "value": 2}, {"step": 4, "value": 2}],
        [{"step": 0, "value": 1, "until": 3}],
        [{"step": 0, "value": -1}],
        [{"step": 0, "value": math.inf}],
        [{"step": 0, "value": 1}, {"step": 10**26, "value": 2}],
        -0.1,
        math.nan,
        math.inf,
        "fast",
    ],
)
def test_nonsense_is_refused(given: object) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(given)


def test_learning_rate() -> None:
    rates = [learning_rate(s, peak=2.0, warmup_steps=4, total_steps=14, min_ratio=0.1) for s in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[9] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[4:15] == sorted(rates[4:15], reverse=True)
    assert rates[14:] == pytest.approx([0.2] * 6)


def test_learning_rate_without_warmup_or_room() -> None:
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0
    assert learning_rate(5, peak=1.0, warmup_steps=5, total_steps=5, min_ratio=0.5) == 1.0
    assert learning_rate(6, peak=1.0, warmup_steps=5, total_steps=5, min_ratio=0.5) == 0.5
