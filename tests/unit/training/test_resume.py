"""A stopped run resumes with the same trajectory, with another number of hosts and workers too."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from errors import ConfigError
from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state
from jobs.config.run_config import RunConfig
from jobs.training.metrics_file import METRICS_FILE
from jobs.training.resumed_config import resumed_config
from jobs.training.run_start import RunStart
from jobs.training.train import _start
from support.training_job import RunOutcome, difference, text_corpus, tiny, train

pytestmark = pytest.mark.slow

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
STEPS, STOP = 24, 12


def config(hosts: int, workers: int, balance: str = "bias") -> RunConfig:
    return tiny(
        training={
            "dtype": "float64",
            "steps": STEPS,
            "workers": workers,
            "eval_interval": 0,
            "tensorboard": False,
            "batch_size": 8,
        },
        balance={"strategy": balance},
        checkpoint={"interval": STOP},
        cluster={"expert_hosts": hosts},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    run = config(2, 1)
    return train(run, text_corpus(run, TEXT), tmp_path_factory.mktemp("whole"), channel="shm")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was asked to stop half-way."""
    run, output = config(2, 1), tmp_path_factory.mktemp("stopped")
    train(run, text_corpus(run, TEXT), output, channel="shm", stop_after=STOP)
    return output


def test_a_run_that_failed_before_its_first_step_is_none(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).touch()
    begin, _ = _start(config(2, 1), tmp_path, resume=False, init=None)
    assert begin.step == 0
    (tmp_path / METRICS_FILE).write_text("{}\n")
    with pytest.raises(ConfigError, match="holds a run already"):
        _start(config(2, 1), tmp_path, resume=False, init=None)


def test_a_timeline_is_of_the_run_that_it_was_asked_for(stopped: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    state = find_checkpoint(output) / "state.json"
    values = json.loads(state.read_text())
    values["config"]["training"]["profile_steps"] = 3
    state.write_text(json.dumps(values))
    assert resumed_config(output).training.profile_steps == 0
    assert resumed_config(output, ["training.profile_steps=2"]).training.profile_steps == 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("hosts", "workers"), [(2, 1), (4, 2), (1, 2), (0, 1), (0, 2)])
def test_goes_on_with_the_same_trajectory(
    whole: RunOutcome, stopped: Path, tmp_path: Path, hosts: int, workers: int
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    checkpoint = find_checkpoint(output)
    assert read_state(checkpoint).step == STOP
    run = config(hosts, workers)
    start = RunStart(run="resumed", step=STOP, weights=checkpoint, moments=True)
    outcome = train(run, text_corpus(run, TEXT), output, start=start, channel="shm")
    assert [line["step"] for line in outcome.metrics] == list(range(1, STEPS + 1))
    losses, weights, bias = difference(outcome, whole)
    assert losses <= 1e-9
    assert weights <= 1e-8
    assert bias == 0.0


def test_recompute_changes_nothing_but_memory(whole: RunOutcome, tmp_path: Path) -> None:
    values = config(2, 1).to_dict()
    values["training"]["recompute"] = True
    run = RunConfig.from_dict(values)
    outcome = train(run, text_corpus(run, TEXT), tmp_path, channel="shm")
    losses, weights, bias = difference(outcome, whole)
    assert losses <= 1e-9
    assert weights <= 1e-8
    assert bias == 0.0
    assert [line["max_violation"] for line in outcome.metrics] == [
        line["max_violation"] for line in whole.metrics
    ]


def test_what_a_resumed_run_changes_is_told(stopped: Path) -> None:
    told: list[str] = []

    def of(*overrides: str) -> list[str]:
        told.clear()
        resumed_config(stopped, overrides, note=told.append)
        return list(told)

    assert of() == []
    assert of("training.workers=2") == ["--resume: training.workers is 2, was 1"]
    assert of("training.dtype=float32") == [
        "--resume: training.dtype is float32, was float64",
        "--resume: steps are computed in float32 from here on, in float64 before; losses differ by its "
        "rounding",
    ]
    training = config(2, 1).training
    assert training.warmup_steps < STOP
    floor = training.min_learning_rate_ratio

    def rate(step: int, steps: int) -> float:
        """A cosine from the peak at the end of the warm-up to its floor at the last step."""
        done = (step - training.warmup_steps) / (steps - training.warmup_steps)
        return training.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)

    changed, jump = of("training.steps=1000")
    assert changed == "--resume: training.steps is 1000, was 24"
    now, last = rate(STOP, 1000), rate(STOP - 1, STEPS)
    assert now / last > 1.4
    assert jump == (
        f"--resume: the learning rate of step {STOP + 1} is {now:.3g}, {now / last:.3g} times the {last:.3g} "
        f"of step {STOP}; without the changes it would be {rate(STOP, STEPS):.3g}"
    )
