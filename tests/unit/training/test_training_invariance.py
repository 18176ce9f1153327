"""Scaling never changes the function: any hosts, workers and channel give the same trajectory.

The whole matrix runs under `make soak`; `make test` runs a covering part of it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import pytest
import torch

from support.training_job import RunOutcome, difference, text_corpus, tiny, train

pytestmark = pytest.mark.slow

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
ALL = list(
    itertools.product(["float32", "float64"], [0, 1, 2, 4], [1, 2], ["local", "shm", "collective", "grpc"])
)
COVERING = [
    ("float64", 0, 2, "local"),
    ("float64", 1, 1, "shm"),
    ("float64", 2, 1, "local"),
    ("float64", 2, 2, "shm"),
    ("float64", 4, 2, "grpc"),
    ("float32", 0, 2, "local"),
    ("float32", 2, 1, "grpc"),
    ("float64", 2, 2, "collective"),
    ("float32", 4, 2, "shm"),
]


def run(
    dtype: str, hosts: int, workers: int, channel: str, steps: int, output: Path, **training: int
) -> RunOutcome:
    config = tiny(
        training={
            "dtype": dtype,
            "steps": steps,
            "workers": workers,
            "eval_interval": 0,
            "tensorboard": False,
            "batch_size": 8,
            **training,
        },
        checkpoint={"interval": 0},
        cluster={"expert_hosts": hosts},
    )
    return train(config, text_corpus(config, TEXT), output, channel=channel)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunOutcome]:
    """The run of one worker with its experts in process, for each dtype."""
    torch.set_num_threads(1)
    return {
        dtype: run(dtype, 0, 1, "local", 50, tmp_path_factory.mktemp(dtype))
        for dtype in ("float32", "float64")
    }


def assert_same(outcome: RunOutcome, reference: RunOutcome, dtype: str) -> None:
    losses, weights, bias = difference(outcome, reference)
    assert bias == 0.0
    if dtype == "float64":
        assert losses <= 1e-9
        assert weights <= 1e-8
    else:
        assert losses <= 1e-3


def test_the_reference_learns(references: dict[str, RunOutcome]) -> None:
    """Without this, the comparisons could hold between runs that learn nothing."""
    for outcome in references.values():
        assert len(outcome.losses) == 50
        assert outcome.losses[-1] < 0.8 * outcome.losses[0]
        assert all(math.isfinite(loss) for loss in outcome.losses)
        assert any(
            name.endswith("e_score_correction_bias") and bool(t.any()) for name, t in outcome.trunk.items()
        )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("dtype", "hosts", "workers", "channel"), COVERING)
def test_same_trajectory(
    references: dict[str, RunOutcome], tmp_path: Path, dtype: str, hosts: int, workers: int, channel: str
) -> None:
    assert_same(run(dtype, hosts, workers, channel, 50, tmp_path), references[dtype], dtype)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("channel", ["local", "shm"])
def test_lanes_that_take_turns_change_nothing(
    references: dict[str, RunOutcome], tmp_path: Path, channel: str
) -> None:
    outcome = run("float64", 2, 1, channel, 50, tmp_path, microbatches_in_flight=3, computing_at_once=1)
    assert_same(outcome, references["float64"], "float64")


@pytest.mark.soak
@pytest.mark.parametrize(("dtype", "hosts", "workers", "channel"), ALL)
def test_same_trajectory_everywhere(
    references: dict[str, RunOutcome], tmp_path: Path, dtype: str, hosts: int, workers: int, channel: str
) -> None:
    if hosts == 0 and channel != "local":
        pytest.skip("experts in process are reached by the local channel alone")
    assert_same(run(dtype, hosts, workers, channel, 50, tmp_path), references[dtype], dtype)
