"""Decides whether to draft, by measuring tokens per second with and without drafts. No torch here.

A draft costs a pass of its module and a position in the next step, and gains a token if it is accepted. With
one sequence a step takes little longer for it; where a step is bound by arithmetic, it takes considerably
longer. So the decision depends on the number of running sequences and on their text.

For each range of that number the pacer keeps a mode (drafts or no drafts), and from time to time runs a few
steps (a trial) in the other mode. A trial is compared with the steps just before it, so that a change in the
machine's speed does not count, and trials are combined until the difference is significant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_SPAN = 64  # steps over which the speed of the current mode is averaged
_SURPRISE = 0.02  # lower bound of a trial's relative standard error
_KEPT = 0.8  # factor on the weight of earlier trials at each new trial


@dataclass(frozen=True, slots=True, kw_only=True)
class PacingSettings:
    """Frequency of trials, and significance required to change the mode.

    Attributes:
        trial: Steps counted in a trial; one more step at its beginning belongs to both modes.
        budget: Share of steps spent on trials.
        first_trials: Number of trials of each range that come sooner, one every four trial lengths.
        margin: Relative gain below which the mode does not change.
        certainty: Number of standard errors that a gain must be above the margin.
        patience: Consecutive steps in another range before that range becomes the current one.
    """

    trial: int = 8
    budget: float = 0.025
    first_trials: int = 4
    margin: float = 0.02
    certainty: float = 2.0
    patience: int = 4


@dataclass(slots=True)
class Speed:
    """Tokens per second over steps with exponentially decaying weights, and its relative standard error.

    Args:
        keep: Factor on the weight of earlier steps at each new step; 1 weighs all steps equally.
    """

    keep: float = 1.0
    _n: float = 0.0
    _n2: float = 0.0
    _t: float = 0.0
    _s: float = 0.0
    _tt: float = 0.0
    _ts: float = 0.0
    _ss: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Add a step."""
        keep = self.keep
        self._n = keep * self._n + 1
        self._n2 = keep * keep * self._n2 + 1
        self._t = keep * self._t + tokens
        self._s = keep * self._s + seconds
        self._tt = keep * self._tt + tokens * tokens
        self._ts = keep * self._ts + tokens * seconds
        self._ss = keep * self._ss + seconds * seconds

    @property
    def steps(self) -> float:
        """Effective number of steps."""
        return self._n * self._n / self._n2 if self._n2 else 0.0

    @property
    def rate(self) -> float:
        """Tokens per second, as a ratio of sums, because a mean of ratios is biased."""
        return self._t / self._s if self._s > 0 else 0.0

    @property
    def error(self) -> float:
        """Relative standard error of `rate`, from the scatter of the steps around the ratio."""
        if self.steps < 2 or self._t <= 0:
            return math.inf
        rate = self.rate
        scatter = max(0.0, self._tt - 2 * rate * self._ts + rate * rate * self._ss) / self._n
        mean = self._t / self._n
        return math.sqrt(scatter / (self.steps - 1)) / mean


@dataclass(slots=True)
class _Range:
    """Measurements of one range of numbers of sequences.

    Attributes:
        drafts: The mode.
        speed: Speed in this mode.
        trial: Speed in the other mode during a trial, otherwise None.
        since: Steps since the last trial.
        trials: Number of trials.
        weight: Sum of the trials' precisions.
        gain: Sum of log(speed with drafts / speed without) times the precisions.
    """

    drafts: bool = True
    speed: Speed = field(default_factory=lambda: Speed(keep=1 - 1 / _SPAN))
    trial: Speed | None = None
    since: int = 0
    trials: int = 0
    weight: float = 0.0
    gain: float = 0.0


class DraftPacer:
    """Decides for each step whether to draft.

    The caller calls `wants` before a step's drafts are made, and `note` with the measurements of each step.
    The same calls give the same decisions.

    Args:
        settings: Frequency and significance of trials.
    """

    def __init__(self, settings: PacingSettings | None = None) -> None:
        self._settings = settings or PacingSettings()
        self._ranges: dict[int, _Range] = {}
        self._current: int | None = None
        self._elsewhere = 0
        self._before: bool | None = None

    def wants(self, sequences: int) -> bool:
        """Whether drafts are made in a step.

        Args:
            sequences: Number of generating sequences, at least 1.
        """
        state = self._range(_place(sequences) if self._current is None else self._current)
        return state.drafts if state.trial is None else not state.drafts

    def note(self, *, sequences: int, drafted: bool, seconds: float, tokens: int) -> None:
        """Record a step in which sequences generated tokens and no prompt was computed.

        Args:
            sequences: Number of generating sequences.
            drafted: Whether drafts were made in the step.
            seconds: Duration of the step, including drafting.
            tokens: Number of new tokens of all sequences.
        """
        place = self._track_range(sequences)
        # The first step after a change of mode verifies the drafts of the mode before.
        changed, self._before = drafted != self._before, drafted
        if changed or place != self._current or seconds <= 0:
            return
        state = self._range(place)
        if state.trial is None:
            if drafted == state.drafts:
                state.speed.add(tokens, seconds)
                state.since += 1
                if state.since >= self._interval(state):
                    state.trial = Speed()
        elif drafted != state.drafts:
            state.trial.add(tokens, seconds)
            if state.trial.steps >= self._settings.trial:
                self._judge(state)

    @property
    def modes(self) -> dict[int, bool]:
        """Smallest number of sequences of each range seen so far -> whether drafts are made there."""
        return {place: state.drafts for place, state in sorted(self._ranges.items())}

    def _track_range(self, sequences: int) -> int:
        """The range of a step; it becomes the current range after `patience` consecutive steps."""
        place = _place(sequences)
        self._elsewhere = 0 if place == self._current else self._elsewhere + 1
        if self._current is None or self._elsewhere >= self._settings.patience:
            if self._current is not None:
                self._break_off(self._range(self._current))
            self._current, self._elsewhere = place, 0
        return place

    def _break_off(self, state: _Range) -> None:
        """Discard a trial that a change of range has cut short; it is repeated later."""
        if state.trial is not None:
            state.trial, state.since = None, self._interval(state) // 2

    def _range(self, place: int) -> _Range:
        return self._ranges.setdefault(place, _Range())

    def _interval(self, state: _Range) -> int:
        """Number of steps between two trials."""
        if state.trials < self._settings.first_trials:
            return 4 * self._settings.trial
        return math.ceil((self._settings.trial + 1) * (1 / self._settings.budget - 1))

    def _judge(self, state: _Range) -> None:
        """Compare a trial with the steps before it; change the mode if the combined gain is significant."""
        trial, settings = state.trial, self._settings
        assert trial is not None
        state.trial, state.since = None, 0
        state.trials += 1
        if min(trial.rate, state.speed.rate) <= 0:
            return
        gain = math.log(trial.rate / state.speed.rate)
        variance = _SURPRISE**2 + trial.error**2 + state.speed.error**2
        state.weight = _KEPT * state.weight + 1 / variance
        state.gain = _KEPT * state.gain + (-gain if state.drafts else gain) / variance
        mean = state.gain / state.weight
        sure = settings.margin + settings.certainty / math.sqrt(state.weight)
        if (mean < -sure) if state.drafts else (mean > sure):
            state.drafts = not state.drafts
            state.speed = Speed(keep=1 - 1 / _SPAN)


def _place(sequences: int) -> int:
    """The smallest number of sequences of a range; ranges start at 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    low = 1 << (max(1, sequences).bit_length() - 1)
    return low + low // 2 if low > 1 and sequences >= low + low // 2 else low


__all__ = ["DraftPacer", "PacingSettings", "Speed"]
