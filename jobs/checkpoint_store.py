"""The checkpoints of a run on disk: whole or not there, the last few kept.

    DIR/checkpoints/step-00000200/     a complete checkpoint, named after the steps it has behind it
        config.json, *.safetensors     the weights, in Hugging Face's DeepSeek-V3 format
        optimizer-*.safetensors        AdamW's moments, beside the weights that they belong to
        tokenizer.json, …              the tokenizer
        state.json                     step, configuration, and what else a resumed run needs
    DIR/checkpoints/.writing-…         one in the making; left by a crash, it is removed by the next

Owners write their parts into the directory in the making, then one process makes it visible by a rename.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import CheckpointError

_FORMAT = 1
_STATE = "state.json"
_WRITING = ".writing-"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a run needs beside weights and moments to go on as if it had never stopped.

    The data's position and the order of its rows are functions of (seed, step); the model draws no
    random numbers after its weights are made: there is no generator whose state would have to be kept.

    Attributes:
        step: optimizer steps done; the next step has this index.
        bias_version: updates of the gates' bias so far (the bias itself is among the weights).
        config: the run's configuration as `RunConfig.to_dict` gives it.
        validation: last evaluation, if there was one.
    """

    step: int
    bias_version: int
    config: dict[str, Any]
    validation: dict[str, float] | None = None


class CheckpointStore:
    """The `checkpoints` directory of one run.

    Args:
        directory: made when the first checkpoint begins.
        keep: complete checkpoints that stay.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        self._directory = directory
        self._keep = keep

    def begin(self, step: int) -> Path:
        """An empty directory in the making, for all owners to write into."""
        writing = self._directory / f"{_WRITING}{_name(step)}"
        self._directory.mkdir(parents=True, exist_ok=True)
        for left_over in self._directory.glob(f"{_WRITING}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        writing.mkdir()
        return writing

    def commit(self, step: int, state: TrainingState) -> Path:
        """Make the checkpoint in the making visible as a whole, and drop those that are too old."""
        writing = self._directory / f"{_WRITING}{_name(step)}"
        values = {"format": _FORMAT, **asdict(state)}
        (writing / _STATE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in writing.iterdir():
            _sync(file)
        _sync(writing)
        final = self._directory / _name(step)
        if final.exists():  # the same step, written before a resume: the same contents
            shutil.rmtree(final)
        writing.rename(final)
        _sync(self._directory)
        for old in self.complete()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self._directory.glob("step-*") if (path / _STATE).is_file())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: itself, or the latest of a run's directory.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run's directory or one of its checkpoints")
    if (path / _STATE).is_file():
        return path
    for directory in (path / "checkpoints", path):
        complete = CheckpointStore(directory).complete()
        if complete:
            return complete[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (checkpoints/step-*/{_STATE})")


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of a later format.
    """
    file = checkpoint / _STATE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {_STATE}: it holds weights only; use --init") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); use an earlier checkpoint") from None
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{file} is not of format {_FORMAT}: written by another version of raymoe")
    try:
        return TrainingState(**values)
    except TypeError as error:
        raise CheckpointError(f"{file} lacks what a resume needs ({error})") from None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["CheckpointStore", "TrainingState", "find_checkpoint", "read_state"]
