"""`raymoe bench serve` as a user runs it: it starts a server, offers load, prints figures, cleans up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.commands.serve import save_model, tiny_model

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("served") / "tiny")


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", "bench", "serve", "--json", *map(str, options)]


def start(*options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the server's expert hosts run; return all descendants of the process."""
    deadline = time.monotonic() + 120
    while True:
        family = psutil.Process(process.pid).children(recursive=True)
        titles = []
        for one in family:
            try:
                titles.append(" ".join(one.cmdline()))
            except psutil.Error:
                continue
        if any("ExpertHost" in title for title in titles):
            return family
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            pytest.fail("the benchmark has ended before its server was there")


@pytest.mark.soak
def test_a_load_of_mixed_requests_is_measured(directory: Path) -> None:
    settings = ("--set", "cluster.expert_hosts=2", "--set", "serving.name=mine")
    process = start(
        *("--checkpoint", directory, *settings, "--requests", 30, "--drops", 0.2),
        *("--probe-seconds", 3, "--load", 0.5, "--temperature", 0.8, "--seed", 3),
    )
    family = wait_for_workers(process)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["model"] == "mine"
    assert found["failed"] == 0
    assert found["errors"] == {}
    assert found["completed"] + found["dropped"] == 30
    assert found["dropped"] > 0
    assert found["request_rate"] == pytest.approx(0.5 * found["capacity"]["request_throughput"])
    assert found["total_output_tokens"] > found["completed"]
    for name in ("ttft", "itl", "e2el"):
        assert 0 <= found[f"p50_{name}_ms"] <= found[f"p90_{name}_ms"] <= found[f"p99_{name}_ms"]
    assert found["p99_e2el_ms"] > found["p50_ttft_ms"] > 0
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_load_leaves_no_process(directory: Path, number: signal.Signals) -> None:
    process = start("--checkpoint", directory, "--rate", 5, "--duration", 600)
    family = wait_for_workers(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_server_that_does_not_come_up_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--checkpoint", tmp_path / "none"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "raymoe serve did not start" in done.stderr.splitlines()[-1]
    assert str(tmp_path / "none") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
