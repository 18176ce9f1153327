"""The checkpoints of a run are whole or absent, and the newest is never lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errors import CheckpointError
from jobs.checkpoints.checkpoint_store import CheckpointStore, TrainingState, find_checkpoint, read_state


def write(store: CheckpointStore, step: int) -> Path:
    (store.begin(step) / "weights").write_text(str(step))
    return store.commit(step, TrainingState(step=step, bias_version=step, config={}))


def test_the_last_ones_stay_and_the_one_just_written_always_does(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (100, 200, 300):
        write(store, step)
    assert [path.name for path in store.complete()] == ["step-00000200", "step-00000300"]
    earlier = write(store, 50)
    assert earlier.is_dir()
    assert [path.name for path in store.complete()] == ["step-00000050", "step-00000300"]
    again = write(store, 300)
    assert read_state(again).step == 300
    assert not list(tmp_path.glob(".*"))


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)

    def stopped(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            write(store, 2)
    assert [path.name for path in store.complete()] == ["step-00000002"]
    store.begin(3)
    assert [path.name for path in tmp_path.glob(".deleting-*")] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "abc"}, "step is no int"),
        ({"step": -1}, "step .* is negative"),
        ({"config": None}, "config is no dict"),
        ({"format": 9}, "not of format"),
    ],
)
def test_a_state_that_is_none_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = write(CheckpointStore(tmp_path), 1)
    file = checkpoint / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=f"state.json.*{message}"):
        read_state(checkpoint)


def test_weights_alone_are_told_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="use --init"):
        find_checkpoint(tmp_path)
