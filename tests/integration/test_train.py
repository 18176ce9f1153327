"""`raymoe train` killed, interrupted and resumed for real."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state
from jobs.fleet.ray_address import temporary_folder
from support.commands.train import STEPS, assert_gone, family, finish, losses, start, wait_for_step

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("train")]


@pytest.fixture(scope="module")
def killed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run whose every process was killed in the middle of it, after step 30."""
    output = tmp_path_factory.mktemp("killed") / "run"
    process = start(corpus, output)
    try:
        wait_for_step(process, output, 31)
        members = family(process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    for member in members:
        if member.is_running():
            member.kill()
    process.communicate()
    assert_gone(members)
    yield output


@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.soak)])
def test_resume_after_everything_was_killed(
    corpus: Path, whole: Path, killed: Path, tmp_path: Path, hosts: int, workers: int
) -> None:
    output = tmp_path / "run"
    subprocess.run(["cp", "-r", str(killed), str(output)], check=True)
    assert 30 <= read_state(find_checkpoint(output)).step < STEPS
    changed = {"cluster__expert_hosts": hosts, "training__workers": workers}
    finish(start(corpus, output, "--resume", str(output), **changed))
    differences = [abs(a - b) for a, b in zip(losses(output), losses(whole), strict=True)]
    assert max(differences) <= 1e-9


@pytest.mark.parametrize(
    ("send", "number"), [(os.kill, signal.SIGINT), (os.killpg, signal.SIGTERM)], ids=["ctrl-c", "group"]
)
def test_interrupt_ends_with_a_checkpoint_and_leaves_nothing(
    corpus: Path, tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    """Ctrl-C, and SIGTERM to the process group, as service managers send it."""
    output = tmp_path / "run"
    process = start(corpus, output, training__steps=100_000, checkpoint__interval=0)
    wait_for_step(process, output, 3)
    members = family(process)
    assert len(members) > 3
    send(process.pid, number)
    result, err = finish(process)
    assert result["interrupted"] is True
    assert "atal" not in err and "Traceback" not in err
    assert "checkpoint" in err
    assert read_state(find_checkpoint(output)).step == result["step"]
    assert_gone(members)
    assert not list((output / "checkpoints").glob(".writing-*"))
    assert not list(temporary_folder().glob(f"session_*_{process.pid}"))
    assert not (output / "ray_train").exists()


@pytest.mark.soak
def test_a_shared_trunk_survives_a_killed_worker(corpus: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(
        corpus,
        output,
        training__workers=2,
        training__trunk_sharding="fsdp",
        training__microbatches_in_flight=1,
        training__microbatch_size=2,
    )
    try:
        wait_for_step(process, output, 15)
        workers = [one for one in family(process) if any("RayTrainWorker" in part for part in one.cmdline())]
        assert len(workers) == 2
        workers[-1].kill()
        finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert read_state(find_checkpoint(output)).step == STEPS
    differences = [abs(a - b) for a, b in zip(losses(output), losses(whole), strict=True)]
    assert max(differences) <= 1e-9
