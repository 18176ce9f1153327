"""Whether drafts pay: tokens per second with and without them, found out on the way. No torch here.

A draft costs its module's pass and a position of the next step, and brings a token when it is right. At one
sequence a step takes little longer for it; where a step is bound by arithmetic it does. So the answer depends
on how many sequences run, and changes with what they are about.

For each range of that number the pacer keeps a mode, drafts or none, and from time to time spends a few steps
(a trial) in the other one. What a trial finds is held against the steps just before it, so that a machine
that became slower in between tells nothing, and trials add up until they are beyond doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_SPAN = 64  # steps over which the speed of the present mode is averaged
_SURPRISE = 0.02  # standard error that no trial is better than, relative
_KEPT = 0.8  # weight that earlier trials keep at each new one


@dataclass(frozen=True, slots=True, kw_only=True)
class PacingSettings:
    """How much is spent on finding out, and how sure is sure.

    Attributes:
        trial: steps that count in a trial; one more, at its beginning, belongs to both modes.
        budget: share of steps that go into trials.
        first_trials: trials of each range that come sooner, one every 4 trials' length.
        margin: gain below which neither mode is better, relative.
        certainty: standard errors that a gain must be above the margin.
        patience: steps that the number of sequences must be in another range for it to count.
    """

    trial: int = 8
    budget: float = 0.025
    first_trials: int = 4
    margin: float = 0.02
    certainty: float = 2.0
    patience: int = 4


@dataclass(slots=True)
class Speed:
    """Tokens per second over steps, recent ones counting more, with its relative standard error.

    Args:
        keep: weight that earlier steps keep at each new one; 1 forgets nothing.
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
        """One more step."""
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
        """How many steps count, were all to count alike."""
        return self._n * self._n / self._n2 if self._n2 else 0.0

    @property
    def rate(self) -> float:
        """Tokens per second: a ratio of sums, as a mean of ratios would favour slow steps."""
        return self._t / self._s if self._s > 0 else 0.0

    @property
    def error(self) -> float:
        """Standard error of `rate` relative to it, by the steps' scatter around the ratio."""
        if self.steps < 2 or self._t <= 0:
            return math.inf
        rate = self.rate
        scatter = max(0.0, self._tt - 2 * rate * self._ts + rate * rate * self._ss) / self._n
        mean = self._t / self._n
        return math.sqrt(scatter / (self.steps - 1)) / mean


@dataclass(slots=True)
class _Range:
    """What is known about one range of numbers of sequences.

    Attributes:
        drafts: the mode.
        speed: in this mode.
        trial: speed in the other one, while it is tried.
        since: steps since the last trial.
        weight, gain: of all trials: the sum of their precisions, and of log(with / without) times them.
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

    The caller asks `wants` before a step's drafts are made and tells `note` what a step took. Deterministic:
    the same calls get the same answers.

    Args:
        settings: how much is spent on finding out.
    """

    def __init__(self, settings: PacingSettings | None = None) -> None:
        self._settings = settings or PacingSettings()
        self._ranges: dict[int, _Range] = {}
        self._current: int | None = None
        self._elsewhere = 0
        self._before: bool | None = None

    def wants(self, sequences: int) -> bool:
        """Whether a step with so many sequences is to make drafts.

        Args:
            sequences: that generate; at least 1.
        """
        state = self._range(_place(sequences) if self._current is None else self._current)
        return state.drafts if state.trial is None else not state.drafts

    def note(self, *, sequences: int, drafted: bool, seconds: float, tokens: int) -> None:
        """Take notice of a step in which sequences generated and no prompt was read.

        Args:
            sequences: as in `wants`.
            drafted: whether drafts were made in it.
            seconds: that it took, drafting included.
            tokens: that it brought, over all sequences.
        """
        place = self._settle(sequences)
        # The first step in a mode judges the drafts, or has none to judge, of the mode before.
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
        """Smallest number of sequences of each range seen so far -> whether drafts pay there."""
        return {place: state.drafts for place, state in sorted(self._ranges.items())}

    def _settle(self, sequences: int) -> int:
        """A step's range, which becomes the current one when it has been another for long enough."""
        place = _place(sequences)
        self._elsewhere = 0 if place == self._current else self._elsewhere + 1
        if self._current is None or self._elsewhere >= self._settings.patience:
            if self._current is not None:
                self._break_off(self._range(self._current))
            self._current, self._elsewhere = place, 0
        return place

    def _break_off(self, state: _Range) -> None:
        """A trial that the number of sequences has cut short proves nothing, and is made again later."""
        if state.trial is not None:
            state.trial, state.since = None, self._interval(state) // 2

    def _range(self, place: int) -> _Range:
        return self._ranges.setdefault(place, _Range())

    def _interval(self, state: _Range) -> int:
        """Steps between two trials."""
        if state.trials < self._settings.first_trials:
            return 4 * self._settings.trial
        return math.ceil((self._settings.trial + 1) * (1 / self._settings.budget - 1))

    def _judge(self, state: _Range) -> None:
        """Hold a trial against the steps before it, and change the mode if all trials together say so."""
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
    """The smallest number of a number's range: 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    low = 1 << (max(1, sequences).bit_length() - 1)
    return low + low // 2 if low > 1 and sequences >= low + low // 2 else low


__all__ = ["DraftPacer", "PacingSettings", "Speed"]
