"""Scaling never changes the function: any hosts, workers and channel give the same trajectory.

The whole matrix runs under `make soak`; `make test` runs a covering part of it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

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
    dtype: str,
    hosts: int,
    workers: int,
    channel: str,
    steps: int,
    output: Path,
    balance: dict[str, Any] | None = None,
    **training: Any,
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
        balance=balance or {},
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


BALANCE: dict[str, dict[str, Any]] = {
    "auxiliary": {"strategy": "auxiliary", "auxiliary_weight": 0.1, "sequence_weight": 0.01},
    "device": {
        "strategy": "device",
        "device_weights": {"expert": 0.03, "device": 0.05, "communication": 0.02},
    },
}


@pytest.mark.parametrize("strategy", list(BALANCE))
def test_losses_of_the_load_do_not_depend_on_the_division_of_work(strategy: str, tmp_path: Path) -> None:
    """Their fractions of the load are those of the global batch, which is one microbatch in the reference."""
    torch.set_num_threads(1)
    balance = BALANCE[strategy]
    whole = run("float64", 0, 1, "local", 8, tmp_path / "whole", balance, microbatch_size=8)
    assert all(line["balance_loss"] > 0.01 for line in whole.metrics)
    divisions: list[tuple[int, int, str, dict[str, Any]]] = [
        (0, 1, "local", {"microbatch_size": 2}),
        (0, 2, "local", {"microbatch_size": 1, "recompute": True}),
        (2, 2, "shm", {"microbatch_size": 1}),
    ]
    for at, (hosts, workers, channel, training) in enumerate(divisions):
        outcome = run("float64", hosts, workers, channel, 8, tmp_path / str(at), balance, **training)
        assert_same(outcome, whole, "float64")
        for mine, theirs in zip(outcome.metrics, whole.metrics, strict=True):
            assert mine["balance_loss"] == pytest.approx(theirs["balance_loss"], rel=1e-9)
            assert mine["max_violation"] == theirs["max_violation"]


@pytest.mark.soak
@pytest.mark.parametrize(("dtype", "hosts", "workers", "channel"), ALL)
def test_same_trajectory_everywhere(
    references: dict[str, RunOutcome], tmp_path: Path, dtype: str, hosts: int, workers: int, channel: str
) -> None:
    if hosts == 0 and channel != "local":
        pytest.skip("experts in process are reached by the local channel alone")
    assert_same(run(dtype, hosts, workers, channel, 50, tmp_path), references[dtype], dtype)
