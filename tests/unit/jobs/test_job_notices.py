"""Notices by which commands find the jobs of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.fleet.job_notices import JobNotice, local_jobs, posted

ROOT = Path(__file__).parents[3]


def notice(id: str, name: str) -> JobNotice:
    return JobNotice(id=id, name=name, cluster="127.0.0.1:6379", coordinator="grpc:127.0.0.1:40123")


def test_a_job_is_found_as_long_as_it_runs(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    assert local_jobs(folder) == []
    with posted(notice("b", "beta"), folder), posted(notice("a", "alpha"), folder):
        assert local_jobs(folder) == [notice("a", "alpha"), notice("b", "beta")]
    assert local_jobs(folder) == []
    assert list(folder.iterdir()) == []


def test_what_a_killed_job_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    script = (
        "import os, sys; from pathlib import Path; from jobs.fleet.job_notices import JobNotice, posted\n"
        "notice = JobNotice(id='k', name='killed', cluster='', coordinator='')\n"
        "kept = posted(notice, Path(sys.argv[1]))\nkept.__enter__()\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT, check=True, timeout=60)
    assert [file.name for file in folder.iterdir()] == ["k.json"]
    assert local_jobs(folder) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"id": "x"}', '{"id": "x", "port": 1}'])
def test_a_notice_of_another_version_is_left_alone(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "jobs"
    with posted(notice("x", "x"), folder):
        (folder / "x.json").write_text(content)
        assert local_jobs(folder) == []
        assert (folder / "x.json").exists()


def test_a_folder_that_others_can_write_to_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    with posted(notice("a", "alpha"), folder):
        folder.chmod(0o777)
        assert local_jobs(folder) == []
        with posted(notice("b", "beta"), folder):
            assert {file.name for file in folder.iterdir()} == {"a.json"}
    link = tmp_path / "link"
    folder.chmod(0o700)
    link.symlink_to(folder)
    with posted(notice("c", "gamma"), link):
        assert list(folder.iterdir()) == []
