"""`raymoe train` as a user runs it: own process, own Ray, killed and resumed for real."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.checkpoint_store import find_checkpoint, read_state
from jobs.metrics import METRICS_FILE, read_metrics

pytestmark = pytest.mark.timeout(300)
STEPS = 60
SETTINGS = {
    "training.dtype": "float64",
    "training.steps": STEPS,
    "training.eval_interval": 0,
    "training.tensorboard": "false",
    "checkpoint.interval": 10,
    "cluster.expert_hosts": 2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in several documents."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    for i, start in enumerate(range(0, len(text), 8000)):
        (folder / f"{i:02}.txt").write_text(text[start : start + 8000], encoding="utf-8")
    return folder


def start(corpus: Path, output: Path, *options: str, **changed: Any) -> subprocess.Popen[str]:
    """`raymoe train --preset tiny` in a session of its own."""
    settings = {**SETTINGS, "data.path": corpus, **{k.replace("__", "."): v for k, v in changed.items()}}
    command = [sys.executable, "-m", "jobs.cli", "train", "--json", *options]
    if "--resume" not in options:
        command += ["--preset", "tiny", "--output", str(output)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> tuple[dict[str, Any], str]:
    """The JSON object that a command printed, and what it wrote to stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return json.loads(out) if out else {}, err


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Until the run has written that step down."""
    deadline = time.monotonic() + 180
    while not any(line["step"] >= step for line in read_metrics(output / METRICS_FILE)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result, _ = finish(start(corpus, output))
    assert result["step"] == STEPS
    assert result["interrupted"] is False
    assert result["hosts_per_token"] > 1
    return output


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


def losses(output: Path) -> list[float]:
    lines = read_metrics(output / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["main_loss"] for line in lines]


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


def test_interrupt_ends_with_a_checkpoint_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(corpus, output, training__steps=100_000, checkpoint__interval=0)
    wait_for_step(process, output, 3)
    members = family(process)
    assert len(members) > 3
    os.kill(process.pid, signal.SIGINT)
    result, err = finish(process)
    assert result["interrupted"] is True
    assert "checkpoint" in err
    assert read_state(find_checkpoint(output)).step == result["step"]
    assert_gone(members)
    assert not list((output / "checkpoints").glob(".writing-*"))


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
