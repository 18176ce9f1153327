"""The checkpoints of a run on disk: each one complete or absent, the last few kept.

    DIR/checkpoints/step-00000200/     a complete checkpoint, named after the steps it has behind it
        config.json, *.safetensors     the weights, in Hugging Face's DeepSeek-V3 format
        optimizer-*.safetensors        AdamW's moments of the weights in the file of the same name
        tokenizer.json, …              the tokenizer
        state.json                     step, configuration, last evaluation
    DIR/checkpoints/.writing-…         a checkpoint being written; after a crash the next one removes it
    DIR/checkpoints/.deleting-…        a checkpoint being deleted; likewise

The trunk's worker and the hosts write their parts into `.writing-…`, then worker 0 renames it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import CheckpointError, ConfigError
from jobs.config.hub_names import hub_hint
from jobs.config.run_config import RunConfig
from model.checkpoints.guarded_files import STATE, is_there

_FORMAT = 1
_STATE = "state.json"
_WRITING = ".writing-"
_DELETING = ".deleting-"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """State of a run beside weights and moments.

    The position in the data and the order of its rows are functions of seed and step, and the model draws no
    random numbers after its weights are initialized, so no generator's state is saved.

    Attributes:
        step: Number of optimizer steps done; the next step has this index.
        bias_version: Number of updates of the gates' bias; the bias itself is among the weights.
        config: The run's configuration, from `RunConfig.to_dict`.
        validation: Result of the last evaluation, if there was one.
    """

    step: int
    bias_version: int
    config: dict[str, Any]
    validation: dict[str, float] | None = None


class CheckpointStore:
    """The `checkpoints` directory of one run.

    Args:
        directory: The directory; created with the first checkpoint.
        keep: Number of complete checkpoints to keep.
        needed: A checkpoint that is never deleted.
    """

    def __init__(self, directory: Path, *, keep: int = 2, needed: Path | None = None) -> None:
        self._directory = directory
        self._keep = keep
        self._needed = None if needed is None else needed.resolve()

    def begin(self, step: int) -> Path:
        """Create the empty directory that all processes write their parts into."""
        writing = self._directory / f"{_WRITING}{_name(step)}"
        self._directory.mkdir(parents=True, exist_ok=True)
        for kind in (_WRITING, _DELETING):
            for left_over in self._directory.glob(f"{kind}*"):
                shutil.rmtree(left_over, ignore_errors=True)
        writing.mkdir()
        return writing

    def commit(self, step: int, state: TrainingState) -> Path:
        """Give the written checkpoint its final name, and delete those that are too old."""
        writing = self._directory / f"{_WRITING}{_name(step)}"
        values = {"format": _FORMAT, **asdict(state)}
        (writing / _STATE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for file in writing.iterdir():
            _sync(file)
        _sync(writing)
        final = self._directory / _name(step)
        if final.exists():  # the same step, written before a resume, with the same contents
            self._delete(final)
        writing.rename(final)
        _sync(self._directory)
        others = [path for path in self.complete() if path != final]
        for old in others[: max(0, len(others) - self._keep + 1)]:
            if old.resolve() != self._needed:
                self._delete(old)
        return final

    def _delete(self, checkpoint: Path) -> None:
        """Rename a checkpoint, so that no process finds it in part, and delete it."""
        hidden = checkpoint.with_name(f"{_DELETING}{checkpoint.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self._directory.glob("step-*") if (path / _STATE).is_file())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path: the directory itself, or the latest one of a run's directory.

    Raises:
        CheckpointError: There is none.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a run's directory or one of its checkpoints{hub_hint(path)}"
        )
    if (path / _STATE).is_file():
        return path
    for directory in (path / "checkpoints", path):
        complete = CheckpointStore(directory).complete()
        if complete:
            return complete[-1]
    hint = "; it holds weights only: use --init" if (path / "config.json").is_file() else ""
    raise CheckpointError(f"{path} holds no complete checkpoint (checkpoints/step-*/{_STATE}){hint}")


def find_weights(path: Path) -> Path:
    """The directory with weights at a path: the path itself, or the latest checkpoint of a run's directory.

    Raises:
        CheckpointError: There is none.
    """
    if is_there(path / "config.json"):  # reading it refuses what is no file
        return path
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        if not path.exists():
            raise
        raise CheckpointError(f"{error}, and no config.json of a Hugging Face model either") from None


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        CheckpointError: It is missing, damaged, or of another format.
    """
    file = checkpoint / _STATE
    try:
        values = STATE.json(file)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {_STATE}: it holds weights only; use --init") from None
    if values.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{file} is not of format {_FORMAT}: written by another version of raymoe")
    kinds = {"step": int, "bias_version": int, "config": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise CheckpointError(f"{file}: {name} is no {kind.__name__}; use an earlier checkpoint")
    if values["step"] < 0:
        raise CheckpointError(f"{file}: step ({values['step']}) is negative; use an earlier checkpoint")
    return TrainingState(**{name: values[name] for name in (*kinds, "validation") if name in values})


def run_config(checkpoint: Path, state: TrainingState) -> RunConfig:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: It is none.
    """
    try:
        return RunConfig.from_dict(state.config)
    except ConfigError as error:
        first, *others = str(error).splitlines()
        more = f" and {len(others)} more" if others else ""
        raise CheckpointError(
            f"{checkpoint / _STATE}: config is that of no run ({first}{more}); use an earlier checkpoint"
        ) from None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "CheckpointStore",
    "TrainingState",
    "find_checkpoint",
    "find_weights",
    "read_state",
    "run_config",
]
