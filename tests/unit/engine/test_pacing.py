"""Drafts are switched off while they cost time, and on again when they save time."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from engine.pacing import DraftPacer, PacingSettings, Speed


class SimulatedEngine:
    """Simulated steps.

    Args:
        cost: a drafting step's seconds over a plain one's.
        accepted: share of drafts that are right.
        noise: standard deviation of a step's seconds, relative.
    """

    def __init__(self, *, cost: float, accepted: float, noise: float = 0.0, seed: int = 0) -> None:
        self.cost, self.accepted, self.noise = cost, accepted, noise
        self.slowness = 1.0
        self._source = random.Random(seed)
        self.drafting = False

    def step(self, pacer: DraftPacer, sequences: int) -> bool:
        """One step of an engine, which judges the drafts of the step before."""
        judged, self.drafting = self.drafting, pacer.wants(sequences)
        extra = (self.cost - 1) / 2
        seconds = 0.01 * self.slowness * (1 + extra * judged + extra * self.drafting)
        seconds *= max(0.2, self._source.gauss(1, self.noise))
        right = sum(self._source.random() < self.accepted for _ in range(sequences)) if judged else 0
        pacer.note(sequences=sequences, drafted=self.drafting, seconds=seconds, tokens=sequences + right)
        return self.drafting

    def run(self, pacer: DraftPacer, steps: int, sequences: Callable[[int], int] = lambda _: 1) -> list[bool]:
        return [self.step(pacer, sequences(at)) for at in range(steps)]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_drafts_that_pay_stay_and_looking_elsewhere_is_cheap(noise: float) -> None:
    pacer = DraftPacer()
    drafted = SimulatedEngine(cost=1.2, accepted=0.8, noise=noise).run(pacer, 8000)
    assert pacer.modes == {1: True}
    assert 0.97 < share(drafted[400:]) < 1.0  # it does look, and spends less than 3 % on it


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_drafts_that_do_not_pay_are_switched_off_soon(noise: float) -> None:
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=2.0, accepted=0.2, noise=noise)
    machine.run(pacer, 200)
    assert pacer.modes == {1: False}
    drafted = machine.run(pacer, 8000)
    assert pacer.modes == {1: False}
    assert 0.0 < share(drafted) < 0.03


def test_a_loss_of_a_tenth_is_found_under_noise() -> None:
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=1.5, accepted=0.35, noise=0.1)
    machine.run(pacer, 6000)
    assert pacer.modes == {1: False}


def test_it_follows_what_requests_are_about() -> None:
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=1.4, accepted=0.9, noise=0.1)
    for accepted, mode in ((0.9, True), (0.05, False), (0.9, True)):
        machine.accepted = accepted
        machine.run(pacer, 2500)
        assert pacer.modes == {1: mode}, accepted


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_make_it_flap(seed: int) -> None:
    """With no difference in speed, drafting is switched rarely."""
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=1.5, accepted=0.5, noise=0.3, seed=seed)
    changes = 0
    before = {1: True}
    for _ in range(20000):
        machine.step(pacer, 1)
        changes += pacer.modes != before
        before = pacer.modes
    assert changes <= 2


def test_a_machine_that_slows_down_tells_nothing_about_drafts() -> None:
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=1.3, accepted=0.8, noise=0.05)
    for round in range(20):
        machine.slowness = 1.0 if round % 2 else 3.0
        machine.run(pacer, 400)
        assert pacer.modes == {1: True}


def test_each_number_of_sequences_has_an_answer_of_its_own() -> None:
    pacer = DraftPacer()
    alone, crowd = SimulatedEngine(cost=1.2, accepted=0.8), SimulatedEngine(cost=1.9, accepted=0.5)
    for _ in range(10):
        alone.run(pacer, 300)
        crowd.run(pacer, 300, lambda _: 32)
    assert pacer.modes == {1: True, 32: False}
    assert pacer.wants(32) is False
    alone.run(pacer, 10)
    assert pacer.wants(1) is True


def test_a_number_between_two_answers_does_not_switch_at_every_step() -> None:
    pacer = DraftPacer()
    SimulatedEngine(cost=1.2, accepted=0.8).run(pacer, 2000, lambda _: 4)
    SimulatedEngine(cost=1.9, accepted=0.2).run(pacer, 2000, lambda _: 6)
    assert pacer.modes == {4: True, 6: False}
    between = SimulatedEngine(cost=1.9, accepted=0.2)
    between.drafting = False
    drafted = between.run(pacer, 1000, lambda at: 5 + at % 2)
    assert sum(one != other for one, other in pairwise(drafted)) <= 2 * 4


def test_a_trial_cut_short_is_made_again() -> None:
    pacer = DraftPacer()
    machine = SimulatedEngine(cost=2.0, accepted=0.2)
    while machine.step(pacer, 1):  # until a trial begins
        pass
    machine.run(pacer, 10, lambda _: 64)
    assert pacer.wants(64) is True
    machine.run(pacer, 200)
    assert pacer.modes[1] is False


def test_the_same_steps_get_the_same_answers() -> None:
    runs = [
        SimulatedEngine(cost=1.5, accepted=0.5, noise=0.3).run(
            DraftPacer(), 3000, lambda at: 1 + at // 50 % 9
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_the_budget_is_what_is_spent() -> None:
    settings = PacingSettings(trial=4, budget=0.01, first_trials=0)
    drafted = SimulatedEngine(cost=1.1, accepted=0.9).run(DraftPacer(settings), 10000)
    assert 0.98 < share(drafted) < 0.995


def test_a_speed_is_a_ratio_of_sums_and_knows_its_error() -> None:
    speed = Speed()
    for tokens, seconds in ((1, 1.0), (3, 1.0), (1, 1.0), (3, 1.0)):
        speed.add(tokens, seconds)
    assert speed.rate == pytest.approx(2.0)
    assert speed.steps == pytest.approx(4)
    assert speed.error == pytest.approx((1 / 3) ** 0.5 / 2)  # deviation of the mean of 1, 3, 1, 3 over 2
    steady = Speed(keep=0.9)
    for _ in range(200):
        steady.add(5, 0.5)
    assert steady.error == pytest.approx(0.0, abs=1e-6)
    assert steady.steps == pytest.approx(19, rel=0.01)  # (1 + keep) / (1 - keep)
