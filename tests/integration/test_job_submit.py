"""`ray job submit --working-dir . -- raymoe train …` on a running cluster of several nodes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state
from jobs.training.metrics_file import METRICS_FILE, read_metrics

pytestmark = [
    pytest.mark.timeout(300),
    # Ray's own cluster helper leaves its log files and pipes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# By default every node's agent, of any cluster on this machine, takes the same port.
FREE_PORTS = {"dashboard_agent_listen_port": 0}


def _submit(address: str) -> list[str]:
    return [str(BIN / "ray"), "job", "submit", "--address", address]


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A cluster of two nodes with two CPUs each; the address that jobs are submitted to."""
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{BIN}:{path}"  # what an activated environment gives every node
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, **FREE_PORTS},
    )
    try:
        cluster.add_node(num_cpus=2, **FREE_PORTS)
        address = f"http://{cluster.webui_url}"
        # The dashboard answers before a node can run jobs: wait until one does.
        deadline = time.monotonic() + 60
        while subprocess.run([*_submit(address), "--", "true"], capture_output=True, text=True).returncode:
            assert time.monotonic() < deadline, "the cluster takes no job"
        yield address
    finally:
        cluster.shutdown()
        os.environ["PATH"] = path


def test_a_submitted_job_trains(dashboard: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = {
        "training.steps": 8,
        "training.workers": 2,
        "training.eval_interval": 0,
        "cluster.expert_hosts": 2,
        "data.path": argparse.__file__,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [
        *(*_submit(dashboard), "--working-dir", str(ROOT), "--"),
        *("raymoe", "train", "--preset", "tiny", "--output", str(output), *sets),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in read_metrics(output / METRICS_FILE)] == list(range(1, 9))
    assert read_state(find_checkpoint(output)).step == 8
    assert "validation loss" in done.stdout
