"""What tests of jobs share: a run whose weights are random."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.random_run import write_random_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with a checkpoint of random weights."""
    return write_random_run(tmp_path_factory.mktemp("run"))
