"""`raymoe train` as a user runs it: a process with its own Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from jobs.training.metrics_file import METRICS_FILE, read_metrics
from support.waiting import wait_until

STEPS = 60
SETTINGS = {
    "training.dtype": "float64",
    "training.steps": STEPS,
    "training.eval_interval": 0,
    "training.tensorboard": "false",
    "checkpoint.interval": 10,
    "cluster.expert_hosts": 2,
}


def start(corpus: Path, output: Path, *options: str, **changed: Any) -> subprocess.Popen[str]:
    """Start `raymoe train --preset tiny` in a process group of its own."""
    settings = {**SETTINGS, "data.path": corpus, **{k.replace("__", "."): v for k, v in changed.items()}}
    command = [sys.executable, "-m", "jobs.cli", "train", "--json", *options]
    if "--resume" not in options:
        command += ["--preset", "tiny", "--output", str(output)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> tuple[dict[str, Any], str]:
    """Wait for a command; return the JSON object that it printed, and its stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return json.loads(out) if out else {}, err


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """Wait until the run's metrics contain that step."""

    def reached() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return any(line["step"] >= step for line in read_metrics(output / METRICS_FILE))

    wait_until(reached, seconds=180.0, every=0.05)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, [p.cmdline() for p in alive if p.is_running()]


def losses(output: Path) -> list[float]:
    lines = read_metrics(output / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["main_loss"] for line in lines]
