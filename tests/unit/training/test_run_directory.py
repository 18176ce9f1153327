"""A run's directory belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import ConfigError
from jobs.training.run_directory import run_directory


def test_a_second_run_is_kept_out_while_the_first_one_goes_on(tmp_path: Path) -> None:
    with run_directory(tmp_path / "run") as directory:
        (directory / "metrics.jsonl").touch()
        with (
            pytest.raises(ConfigError, match=r"in use by another run \(process \d+\)"),
            run_directory(directory),
        ):
            pass
    with run_directory(tmp_path / "run") as directory:
        assert (directory / "metrics.jsonl").exists()


def test_a_directory_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_directory(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["/proc/nope/x", "~nobody-of-this-name/x", "/dev/null/x"])
def test_what_cannot_be_a_directory_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"--output .* cannot be written to"), run_directory(Path(path)):
        pass
