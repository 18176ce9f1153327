"""Values that change over a run: piecewise-constant schedules, and the learning rate's warm-up and cosine.

Steps are counted from 0: step s is the optimizer step from version s to version s + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_INT64 = (1 << 63) - 1
_Value = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Point(BaseModel):
    """One entry of a schedule, whose value holds from `step` on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Annotated[int, Field(ge=0, le=_INT64)]
    value: _Value


def _ordered(schedule: float | tuple[Point, ...]) -> float | tuple[Point, ...]:
    if isinstance(schedule, tuple):
        if not schedule or schedule[0].step != 0:
            raise ValueError("a schedule needs a first entry with step 0: what it is at the start")
        for before, after in pairwise(schedule):
            if after.step <= before.step:
                raise ValueError(f"steps must ascend, but {after.step} follows {before.step}")
    return schedule


Schedule = Annotated[_Value | tuple[Point, ...], AfterValidator(_ordered)]
"""A weight or a rate: a constant, or `[{step: 0, value: …}, {step: …, value: …}, …]`, piecewise constant."""


def value_at(schedule: float | Sequence[Point], step: int) -> float:
    """The schedule's value at an optimizer step: that of the last entry at or before it."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    value = schedule[0].value
    for point in schedule:
        if point.step > step:
            break
        value = point.value
    return value


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.0
) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `min_ratio * peak` at `total_steps`.

    Step `warmup_steps - 1` is the first at the peak; from `total_steps` on the rate stays at its floor.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))


__all__ = ["Point", "Schedule", "learning_rate", "value_at"]
