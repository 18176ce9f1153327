"""What several modules train on, and a run that they hold theirs against."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from support.commands.train import STEPS, finish, start


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in several documents."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    for i, begin in enumerate(range(0, len(text), 8000)):
        (folder / f"{i:02}.txt").write_text(text[begin : begin + 8000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result, _ = finish(start(corpus, output))
    assert result["step"] == STEPS
    assert result["interrupted"] is False
    assert result["hosts_per_token"] > 1
    return output
