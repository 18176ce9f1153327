"""Signals at `raymoe serve` and `raymoe train` while they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.fleet.ray_address import temporary_folder
from support.commands.serve import free_port, save_model, tiny_model
from support.commands.train import assert_gone, family, start

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def serving(weights: Path) -> Iterator[subprocess.Popen[str]]:
    """`raymoe serve` in a process group of its own, which waits for its expert hosts."""
    options = ["--json", "--port", str(free_port()), "--set", "cluster.expert_hosts=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", str(weights), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        said = ""
        while "waiting for coordinator and expert hosts" not in said:
            said = process.stderr.readline()
            assert said, process.communicate()
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _sessions(process: subprocess.Popen[str]) -> list[Path]:
    return list(temporary_folder().glob(f"session_*_{process.pid}"))


def test_sigterm_to_the_group_ends_a_server_that_starts(serving: subprocess.Popen[str]) -> None:
    members = family(serving)
    assert len(members) > 3
    assert all(os.getpgid(one.pid) != serving.pid for one in members if one.is_running())
    assert _sessions(serving)
    os.killpg(serving.pid, signal.SIGTERM)
    out, err = serving.communicate(timeout=120)
    assert serving.returncode == 0
    assert out == ""
    assert err.splitlines()[-1] == "stopped before the model was served"
    assert "Traceback" not in err and "rror" not in err
    assert_gone(members)
    assert not _sessions(serving)


def test_a_killed_command_takes_its_ray_cluster_with_it(serving: subprocess.Popen[str]) -> None:
    members = family(serving)
    serving.kill()
    assert_gone(members)


def test_sigterm_ends_a_training_run_while_ray_starts(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "run")
    members: list[psutil.Process] = []
    try:
        while not _sessions(process):
            assert process.poll() is None, process.communicate()
        members = family(process)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        _kill(process)
    assert process.returncode == 0, err
    assert json.loads(out)["interrupted"] is True
    assert err.splitlines()[-1] == "stopped before the first step; no checkpoint was written"
    assert "Traceback" not in err
    assert_gone(members)
    assert not _sessions(process)
    assert not (tmp_path / "run").exists()
