"""The commands beside 30 processes that compute: they come up, or say why not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.commands.serve import free_port, save_model, tiny_model
from support.commands.train import assert_gone, family, finish, start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

BUSY = 30


@pytest.fixture(scope="module", autouse=True)
def busy() -> Iterator[None]:
    """Processes that compute as long as the tests run."""
    with ExitStack() as stack:
        for _ in range(BUSY):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def _answer(*command: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command, "--json"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_server_comes_up_and_is_operated(tmp_path: Path) -> None:
    directory = save_model(tiny_model(), tmp_path / "tiny")
    options = ["--json", "--port", str(free_port()), "--set", "cluster.expert_hosts=2"]
    with (tmp_path / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "serve", str(directory), *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,  # in the session of the busy processes: Linux shares out CPU time by session
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            print((tmp_path / "stderr").read_text(encoding="utf-8"))
            if not line:  # it says why, in one line
                assert process.wait(300) == 1
                assert (
                    (tmp_path / "stderr").read_text(encoding="utf-8").splitlines()[-1].startswith("error: ")
                )
                return
            at = json.loads(line)
            assert len(_answer("status", "--coordinator", at["coordinator"])["hosts"]) == 2
            assert _answer("scale", "3", "--coordinator", at["coordinator"])["hosts"] == 3
            members = family(process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 0
            assert_gone(members)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_a_training_run_comes_up(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "run", training__steps=2, checkpoint__interval=0)
    try:
        process.wait(900)
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode:
        _, err = process.communicate()
        assert err.splitlines()[-1].startswith("error: "), err
        return
    result, err = finish(process)
    print(err)
    assert result["step"] == 2
