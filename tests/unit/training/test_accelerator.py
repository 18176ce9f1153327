"""Trunk, experts and engine on a simulated GPU: no tensor of another device, no wait for a value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import on_accelerator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """The error of each case; `on_accelerator` says why they run in another process."""
    done = subprocess.run(
        [sys.executable, on_accelerator.__file__],
        cwd=Path(__file__).parents[3],
        env={"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", on_accelerator.CASES)
def test_runs_there(said: dict[str, str], case: str) -> None:
    assert said[case] == "", said[case]
