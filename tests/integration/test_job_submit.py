"""`ray job submit --working-dir . -- raymoe train …` on a running cluster of several nodes."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from support.commands.serve import free_port

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def _submit(address: str) -> list[str]:
    return [str(BIN / "ray"), "job", "submit", "--address", address]


def _node(environment: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    """`ray start`, which ends its node on SIGTERM."""
    command = [str(BIN / "ray"), "start", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", *options]
    # By default every node's agent, of any cluster on this machine, takes the same port.
    return subprocess.Popen(
        [*command, "--dashboard-agent-listen-port=0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def dashboard() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of two nodes with two CPUs each, which requires a token.

    Yields the address that jobs are submitted to, and the environment of its user, who has the token.
    """
    ports = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        path = f"{BIN}:{os.environ['PATH']}"  # what an activated environment gives every node
        user = {**os.environ, "PATH": path, "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        user.pop("RAY_AUTH_MODE", None)
        user["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nodes end without waiting for each other's work
        nodes = [_node(user, "--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}")]
        address = f"http://127.0.0.1:{ports[1]}"
        submitter = {**user, "RAY_AUTH_MODE": "token"}
        try:
            # The dashboard answers before a node can run jobs: wait until one does.
            deadline = time.monotonic() + 120
            command = [*_submit(address), "--", "true"]
            while subprocess.run(command, env=submitter, capture_output=True, timeout=120).returncode:
                assert time.monotonic() < deadline, "the cluster takes no job"
            nodes.append(_node(submitter, f"--address=127.0.0.1:{ports[0]}"))
            yield address, user
        finally:
            for node in reversed(nodes):
                family = psutil.Process(node.pid).children(recursive=True)
                node.terminate()
                node.wait(60)
                for one in psutil.wait_procs(family, timeout=30)[1]:
                    one.kill()


def test_a_submitted_job_trains(dashboard: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """As docs/training.md says; without RAY_AUTH_MODE, `ray job submit` sends no token and is refused."""
    address, user = dashboard
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
        *(*_submit(address), "--working-dir", str(ROOT), "--"),
        *("raymoe", "train", "--preset", "tiny", "--output", str(output), *sets),
    ]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=user)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "RAY_AUTH_MODE" in refused.stderr
    submitter = {**user, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=submitter)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in read_metrics(output / METRICS_FILE)] == list(range(1, 9))
    assert read_state(find_checkpoint(output)).step == 8
    assert "validation loss" in done.stdout
