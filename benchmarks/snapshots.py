"""Measures what snapshots in memory cost a training run: `python -m benchmarks.snapshots --json`.

Runs of `raymoe train` with the default interval and without snapshots alternate. A window has as many steps
as the interval, so it contains one snapshot; the figures are medians over all windows of a kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from jobs.training.metrics_file import METRICS_FILE, read_metrics

INTERVAL = ClusterConfig().snapshot_interval
_CORPUS_BYTES = 2_000_000


def write_corpus(folder: Path) -> None:
    """Write a corpus of real text: modules of Python's standard library."""
    folder.mkdir()
    written = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
        written += len(text)
        if written > _CORPUS_BYTES:
            return


def windows(output: Path) -> list[float]:
    """Seconds of every complete window of a run but the first, which warms up."""
    seconds = [line["tokens"] / line["tokens_per_second"] for line in read_metrics(output / METRICS_FILE)]
    starts = range(INTERVAL, len(seconds) - INTERVAL + 1, INTERVAL)
    return [sum(seconds[at : at + INTERVAL]) for at in starts]


def train(corpus: Path, output: Path, preset: str, steps: int, interval: int) -> list[float]:
    """Train with this interval of snapshots; return the seconds of each window."""
    settings: dict[str, Any] = {
        "data.path": corpus,
        "training.steps": steps,
        "training.eval_interval": 0,
        "checkpoint.interval": 0,
        "cluster.snapshot_interval": interval,
    }
    command = [sys.executable, "-m", "jobs.cli", "train", "--preset", preset, "--output", str(output)]
    command += [option for name, value in settings.items() for option in ("--set", f"{name}={value}")]
    subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
    return windows(output)


def measure(preset: str, steps: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step with and without snapshots, and their ratio minus one."""
    found: dict[int, list[float]] = {INTERVAL: [], 0: []}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        for turn in range(rounds):
            for interval in found:
                output = Path(folder) / f"run-{turn}-{interval}"
                found[interval] += train(Path(folder) / "corpus", output, preset, steps, interval)
    kept, none = (statistics.median(found[interval]) / INTERVAL for interval in (INTERVAL, 0))
    return {
        "preset": preset,
        "interval": INTERVAL,
        "step_seconds": kept,
        "step_seconds_without": none,
        "overhead": kept / none - 1,
        "windows": {str(interval): [round(one, 4) for one in all_of] for interval, all_of in found.items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.preset, arguments.steps, arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"a step takes {found['step_seconds']:.3f} s, {found['overhead']:+.1%} by snapshots")


if __name__ == "__main__":
    main()
