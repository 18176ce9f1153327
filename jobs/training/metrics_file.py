"""The metrics of a run, one line per step: `metrics.jsonl`, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from model.checkpoints.guarded_files import METRICS
from model.checkpoints.guarded_json import parse_object

METRICS_FILE = "metrics.jsonl"
_LONGEST_LINE = 1_000_000  # values


class MetricsWriter:
    """Appends one JSON object per step; when a run resumes, lines of steps that are repeated are removed.

    Args:
        directory: The run's directory.
        first_step: Number of steps done; lines of later steps are removed.
        tensorboard: Also write event files into `directory/tensorboard`.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, tensorboard: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.rename(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always needed

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Append the values of one step, whose number is `values["step"]`."""
        self._file.write(json.dumps(values) + "\n")
        if self._board is None:
            return
        for name, value in _scalars(values):
            if name != "step":
                self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line by name; those of a layer or an MTP module as `name/layer` or `name/module`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}/{at}", inner) for at, inner in enumerate(value, start=1))
        else:
            yield name, value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last line that a crash left incomplete."""
    if not path.exists():
        return []
    lines = []
    for line in METRICS.read(path).splitlines():
        try:
            lines.append(parse_object(line, values=_LONGEST_LINE, finite=False))
        except ValueError:
            break
    return lines


__all__ = ["METRICS_FILE", "MetricsWriter", "read_metrics"]
