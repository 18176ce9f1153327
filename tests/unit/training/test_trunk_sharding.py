"""A trunk sharded over two workers makes the steps, checkpoints and recoveries of a whole trunk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from channels.base import Phase
from errors import ConfigError
from jobs.checkpoints.checkpoint_store import find_checkpoint
from jobs.config.run_config import RunConfig
from jobs.training.run_start import RunStart
from model.checkpoints.shards import ShardReader
from support.sharded_training import train_sharded
from support.training_job import RunOutcome, difference, text_corpus, tiny, train
from support.worker_processes import Moment, Workers

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
STEPS, STOP = 12, 6

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def config(sharding: str = "fsdp", *, workers: int = 2, **training: Any) -> RunConfig:
    hosts, interval = training.pop("hosts", 2), training.pop("interval", STOP)
    # Without it, gates have gradients through the experts alone, which are lost with a host.
    weight, strategy = training.pop("sequence_weight", 0.0), training.pop("strategy", "bias")
    return tiny(
        training={
            "dtype": "float64",
            "steps": STEPS,
            "workers": workers,
            "trunk_sharding": sharding,
            # Three microbatches on two workers: one of them makes a pass of nothing each step.
            "batch_size": 6,
            "microbatch_size": 2,
            "microbatches_in_flight": 1,
            "eval_interval": 5,
            "eval_rows": 3,
            "tensorboard": False,
            **training,
        },
        balance={"sequence_weight": weight, "strategy": strategy, "auxiliary_weight": 0.1},
        checkpoint={"interval": interval},
        cluster={"expert_hosts": hosts, "snapshot_interval": 2, "channel": "shm"},
    )


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    """A run of one worker that has all of the trunk, which nothing interrupts."""
    torch.set_num_threads(1)
    run = config("ddp", workers=1)
    return train(run, text_corpus(run, TEXT), tmp_path_factory.mktemp("whole"), channel="shm")


def agrees(outcome: RunOutcome, whole: RunOutcome) -> None:
    assert [line["step"] for line in outcome.metrics] == list(range(1, STEPS + 1))
    losses, weights, bias = difference(outcome, whole)
    assert losses <= 1e-9
    assert weights <= 1e-8
    assert bias == 0.0
    for mine, theirs in zip(outcome.metrics, whole.metrics, strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9)
        assert mine["max_violation"] == theirs["max_violation"]
        if mine["step"] in (5, 10, STEPS):  # a worker in a new process does not know of the evaluation before
            assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-9)


def went_back_to(pauses: list[tuple[str, float]]) -> int:
    """The step of the only interruption; from memory, where there is no checkpoint and it is not 0."""
    ((why, _),) = pauses
    return int(why.rpartition(", at step ")[2])


@pytest.mark.parametrize(("recompute", "sequence_weight"), [(False, 1e-4), (True, 0.0)])
def test_steps_are_those_of_whole_trunks(
    workers: Workers, whole: RunOutcome, tmp_path: Path, recompute: bool, sequence_weight: float
) -> None:
    run = config(recompute=recompute, sequence_weight=sequence_weight)
    if sequence_weight:
        alone = config("ddp", workers=1, sequence_weight=sequence_weight)
        whole = train(alone, text_corpus(alone, TEXT), tmp_path / "alone", channel="shm")
    outcome, shares, pauses = train_sharded(workers, run, text_corpus(run, TEXT), tmp_path)
    agrees(outcome, whole)
    assert not pauses
    assert whole.metrics[0]["grad_norm"] > 0
    for name, tensor in shares[0].trunk.items():
        assert torch.equal(tensor, shares[1].trunk[name])


def test_a_host_lost_while_a_step_is_routed_hangs_nobody(workers: Workers, tmp_path: Path) -> None:
    """`auxiliary` routes the whole global batch first, in a pass without gradients."""
    one = config("ddp", workers=1, strategy="auxiliary")
    whole = train(one, text_corpus(one, TEXT), tmp_path / "whole", channel="shm")
    run = config(hosts=3, interval=0, strategy="auxiliary")
    outcome, _, pauses = train_sharded(
        workers, run, text_corpus(run, TEXT), tmp_path, lose_host=Moment(step=7, phase=Phase.INFER)
    )
    assert went_back_to(pauses) in (2, 4, 6)
    agrees(outcome, whole)


def test_a_share_takes_half_the_memory(workers: Workers, tmp_path: Path) -> None:
    held = {}
    for sharding in ("ddp", "fsdp"):
        run = config(sharding, steps=1)
        output = tmp_path / sharding
        _, held[sharding], _ = train_sharded(workers, run, text_corpus(run, TEXT), output)
    of_all = held["ddp"][0]
    for share in held["fsdp"]:
        assert 0.49 < share.state_bytes / of_all.state_bytes < 0.53
        assert 0.49 < share.gradient_bytes / of_all.gradient_bytes < 0.53


@pytest.mark.parametrize(
    ("first", "then"), [(("fsdp", 2), ("ddp", 1)), (("ddp", 1), ("fsdp", 2)), (("fsdp", 2), ("fsdp", 1))]
)
def test_a_stopped_run_goes_on_either_way(
    workers: Workers, whole: RunOutcome, tmp_path: Path, first: tuple[str, int], then: tuple[str, int]
) -> None:
    start, stop_after = None, STOP
    for sharding, n in (first, then):
        run = config(sharding, workers=n)
        outcome, _, _ = train_sharded(
            workers, run, text_corpus(run, TEXT), tmp_path, start=start, stop_after=stop_after
        )
        checkpoint = find_checkpoint(tmp_path)
        start, stop_after = RunStart(run="resumed", step=STOP, weights=checkpoint, moments=True), None
    agrees(outcome, whole)


def test_checkpoints_are_the_same_files(workers: Workers, tmp_path: Path) -> None:
    for sharding in ("ddp", "fsdp"):
        run = config(sharding, steps=2)
        train_sharded(workers, run, text_corpus(run, TEXT), tmp_path / sharding)
    ddp, fsdp = (find_checkpoint(tmp_path / sharding) for sharding in ("ddp", "fsdp"))
    assert sorted(path.name for path in ddp.iterdir()) == sorted(path.name for path in fsdp.iterdir())
    for file in ("model-trunk.safetensors", "optimizer-trunk.safetensors"):
        one, other = ShardReader(ddp / file), ShardReader(fsdp / file)
        assert one.names == other.names
        for name in one.names:
            assert one.tensor(name).dtype == other.tensor(name).dtype
            assert torch.allclose(one.tensor(name), other.tensor(name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_a_host_lost_in_the_middle_of_a_pass_hangs_nobody(
    workers: Workers, whole: RunOutcome, tmp_path: Path, phase: Phase
) -> None:
    run = config(hosts=3, interval=0)
    outcome, _, pauses = train_sharded(
        workers, run, text_corpus(run, TEXT), tmp_path, lose_host=Moment(step=7, phase=phase, at=1)
    )
    assert went_back_to(pauses) in (2, 4, 6)
    agrees(outcome, whole)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_what_one_worker_alone_loses_hangs_nobody(
    workers: Workers, whole: RunOutcome, tmp_path: Path, phase: Phase
) -> None:
    run = config(interval=0)
    outcome, _, pauses = train_sharded(
        workers, run, text_corpus(run, TEXT), tmp_path, cut_worker=Moment(step=7, phase=phase, at=1)
    )
    assert went_back_to(pauses) in (2, 4, 6)
    agrees(outcome, whole)


def test_a_host_lost_in_an_evaluation_hangs_nobody(
    workers: Workers, whole: RunOutcome, tmp_path: Path
) -> None:
    run = config(hosts=3, interval=0)
    outcome, _, pauses = train_sharded(
        workers, run, text_corpus(run, TEXT), tmp_path, lose_host=Moment(step=5, phase=Phase.INFER)
    )
    assert went_back_to(pauses) in (2, 4)
    agrees(outcome, whole)


@pytest.mark.parametrize("remaining", [2, 1])
def test_new_workers_take_the_trunk_from_hosts(
    workers: Workers, whole: RunOutcome, tmp_path: Path, remaining: int
) -> None:
    run = config(interval=0)
    outcome, _, pauses = train_sharded(
        workers,
        run,
        text_corpus(run, TEXT),
        tmp_path,
        lose_worker=Moment(step=5, phase=Phase.BACKWARD, at=1),
        go_on_with=remaining,
    )
    assert went_back_to(pauses) in (2, 4)
    agrees(outcome, whole)


def test_experts_in_the_workers(workers: Workers, whole: RunOutcome, tmp_path: Path) -> None:
    run = config(hosts=0)
    outcome, _, _ = train_sharded(workers, run, text_corpus(run, TEXT), tmp_path)
    outcome.experts = whole.experts  # they are in processes that have ended
    agrees(outcome, whole)


def test_bfloat16_learns_what_whole_trunks_learn(workers: Workers, tmp_path: Path) -> None:
    half = {"dtype": "bfloat16", "recompute": True}
    run = config("ddp", workers=1, **half)
    whole = train(run, text_corpus(run, TEXT), tmp_path / "ddp", channel="shm")
    run = config(**half)
    outcome, _, _ = train_sharded(workers, run, text_corpus(run, TEXT), tmp_path / "fsdp")
    assert {name: one.dtype for name, one in outcome.trunk.items()} == dict.fromkeys(
        outcome.trunk, torch.float32
    )
    assert whole.losses[-1] < whole.losses[0] - 0.1
    apart = [abs(one - other) for one, other in zip(outcome.losses, whole.losses, strict=True)]
    assert max(apart) < 0.01 * whole.losses[0]


def test_one_pass_at_a_time() -> None:
    with pytest.raises(ConfigError, match=r"training\.microbatches_in_flight \(2\) has to be 1"):
        config(microbatches_in_flight=2)
