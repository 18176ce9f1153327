"""Memory over a long run, and of a model that is larger than any process. Run by `make soak`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs.training.metrics_file import METRICS_FILE, read_metrics
from model.config import ModelConfig
from support.waiting import wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
MIB = 1 << 20


def command(output: Path, corpus: Path, settings: dict[str, object], *options: str) -> list[str]:
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    given = ["--preset", "tiny", "--output", str(output)] if "--resume" not in options else []
    return [
        *(sys.executable, "-m", "jobs.cli", "train", "--json", *given, *options),
        *("--set", f"data.path={corpus}", *sets),
    ]


def actors(process: psutil.Process) -> dict[str, psutil.Process]:
    """Processes of a run's hosts and workers, by role and id."""
    found = {}
    for child in process.children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "ExpertHost" in title or "RayTrainWorker" in title:
            found[f"{'host' if 'ExpertHost' in title else 'worker'}-{child.pid}"] = child
    return found


def done(output: Path) -> int:
    lines = read_metrics(output / METRICS_FILE)
    return int(lines[-1]["step"]) if lines else 0


def alive(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None
    return True


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8") * 4, encoding="utf-8")
    other = tmp_path / "corpus"
    other.mkdir()
    for i in range(8):
        (other / f"{i}.txt").write_text(f"{i}\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    return other


def test_memory_stays_flat_over_a_thousand_steps(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "run"
    settings: dict[str, object] = {
        "training.steps": 1300,
        "training.eval_interval": 0,
        "training.tensorboard": "false",
        "checkpoint.interval": 0,
        "cluster.expert_hosts": 2,
    }
    with subprocess.Popen(command(output, corpus, settings), stdout=subprocess.PIPE, text=True) as process:
        sampled: dict[int, dict[str, int]] = {}
        for step in (250, 1250):
            wait_until(lambda step=step: alive(process) and done(output) >= step, seconds=900.0, every=0.2)  # type: ignore[misc]
            members = actors(psutil.Process(process.pid))
            sampled[done(output)] = {name: member.memory_info().rss for name, member in members.items()}
        process.communicate(timeout=300)
    assert process.returncode == 0
    (first, before), (last, after) = sampled.items()
    assert last - first >= 900
    assert len(before) == 3
    assert before.keys() == after.keys()
    for name in before:
        grown = (after[name] - before[name]) / MIB
        print(
            f"{name}: {before[name] / MIB:.0f} MiB after {first} steps, {grown:+.1f} MiB {last - first} later"
        )
        assert grown < 16
    assert not [name for name in os.listdir("/dev/shm") if "raymoe" in name]


def test_no_process_holds_the_whole_model(tmp_path: Path, corpus: Path) -> None:
    """Train, save and resume; every process peaks far below the size of the model's state."""
    output = tmp_path / "run"
    settings: dict[str, object] = {
        "model.hidden_size": 256,
        "model.moe_intermediate_size": 1024,
        "model.n_routed_experts": 128,
        "training.eval_interval": 0,
        "training.tensorboard": "false",
        "training.steps": 2,
        "checkpoint.interval": 1,
        "checkpoint.keep": 1,
        "cluster.expert_hosts": 8,
        "cluster.cpus_per_host": 0.1,
        # Copies in memory take four times a host's weights and moments, with eight hosts half of the model's.
        "cluster.snapshot_interval": 0,
    }
    peaks: dict[str, int] = {}

    def ended(process: subprocess.Popen[str]) -> bool:
        """Whether the command has ended; if not, measure its processes."""
        if process.poll() is not None:
            return True
        for name, member in actors(psutil.Process(process.pid)).items():
            with suppress(psutil.Error):
                peaks[name] = max(peaks.get(name, 0), member.memory_info().rss)
        return False

    def watched(*options: str) -> None:
        with subprocess.Popen(
            command(output, corpus, settings, *options), stdout=subprocess.PIPE, text=True
        ) as process:
            wait_until(lambda: ended(process), seconds=900.0, every=0.05)
        assert process.returncode == 0

    watched()
    config = ModelConfig.from_hf(
        json.loads((output / "checkpoints" / "step-00000002" / "config.json").read_text(encoding="utf-8"))
    )
    shape_only = ("model.hidden_size", "model.moe_intermediate_size", "model.n_routed_experts")
    for name in shape_only:
        del settings[name]
    settings["training.steps"] = 3
    watched("--resume", str(output))
    whole = config.total_parameters() * 4 * 4  # float32 weight, gradient and two moments
    assert len(peaks) >= 2 * 9
    print(f"state of the model {whole / MIB:.0f} MiB; peaks {sorted(p // MIB for p in peaks.values())} MiB")
    assert max(peaks.values()) < whole / 2
