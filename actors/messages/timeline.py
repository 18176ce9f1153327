"""A timeline of some training steps: when each process computes, and when it waits.

Each process writes its spans into a file, in the trace event format of Chrome's and Perfetto's viewers; the
files of a run are merged into one. Times are wall-clock times: spans of different machines are as accurate as
their clocks.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

FOLDER: Final = "profile"
MERGED: Final = "timeline.json"
WARM_UP: Final = 2
"""First steps of a process that are not recorded: memory is mapped, channels are opened."""


class Timeline:
    """Spans of one process, recorded by any thread.

    Args:
        process: The process's name in the viewer, unique within the run.
        steps: The steps to record.
        folder: Gets the file, after the last of these steps.
    """

    def __init__(self, process: str, steps: range, folder: Path) -> None:
        self._process, self._steps, self._folder = process, steps, folder
        self._pid = zlib.crc32(process.encode()) >> 1  # the format requires a number
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[str, int] = {}
        self._guard = threading.Lock()

    @contextmanager
    def span(self, step: int, name: str, track: str = "", **details: int) -> Iterator[None]:
        """Record what happens within this context as one span, if the step is recorded.

        Args:
            track: The row in the viewer; the thread's own if it is empty.
            details: Shown when the span is selected.
        """
        if step not in self._steps:
            yield
            return
        began = time.time_ns()
        try:
            yield
        finally:
            took = time.time_ns() - began
            with self._guard:
                row = self._tracks.setdefault(track or threading.current_thread().name, len(self._tracks))
                self._events.append(
                    {
                        "name": name,
                        "ph": "X",
                        "ts": began / 1e3,
                        "dur": took / 1e3,
                        "pid": self._pid,
                        "tid": row,
                        "args": {"step": step, **details},
                    }
                )

    def done(self, step: int) -> None:
        """End a step; after the last one to record, write the file."""
        if not self._steps or step != self._steps[-1]:
            return
        with self._guard:
            names = [_name("process_name", self._pid, 0, self._process)]
            names += [_name("thread_name", self._pid, row, track) for track, row in self._tracks.items()]
            _write(self._folder / f"{self._process}.json", [*names, *self._events])
            self._events.clear()  # a run that goes back to an earlier step records it again


def profiled(first: int, count: int, last: int) -> range:
    """The steps to record: `count` of them after a warm-up, of a run of steps `first` to `last` - 1."""
    begin = first + WARM_UP
    return range(begin, max(begin, min(begin + count, last)))


def merge(folder: Path) -> Path | None:
    """Merge the files that the processes of a run have written; None if there are none."""
    files = sorted(file for file in folder.glob("*.json") if file.name != MERGED)
    if not files:
        return None
    events = [event for file in files for event in json.loads(file.read_text("utf-8"))["traceEvents"]]
    _write(folder / MERGED, events)
    return folder / MERGED


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _write(file: Path, events: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_suffix(".tmp")
    making.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    making.rename(file)


__all__ = ["FOLDER", "MERGED", "WARM_UP", "Timeline", "merge", "profiled"]
