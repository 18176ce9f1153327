"""What a job's user is told of its events, and the file that has all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs.training.run_watch
from errors import ChannelError
from jobs.fleet.event_lines import EVENTS_FILE, EventLines
from jobs.training.run_watch import RunWatch

JOINED = {"at": 1.0, "kind": "joined", "text": "expert host host-0"}
DIED = {"at": 2.5, "kind": "died", "text": "expert host host-0: its process ended"}


class ScriptedEvents:
    """A source that gives its batches in turn, then nothing; None stands for a coordinator that is away."""

    def __init__(self, *batches: list[dict[str, Any]] | None) -> None:
        self.batches = list(batches)

    def events(self) -> list[dict[str, Any]]:
        batch = self.batches.pop(0) if self.batches else []
        if batch is None:
            raise ChannelError("away")
        return batch


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


def test_all_events_are_written_and_notable_ones_told(tmp_path: Path) -> None:
    told: list[str] = []
    lines = EventLines(ScriptedEvents([JOINED], None, [DIED]), told.append, file=tmp_path / EVENTS_FILE)
    for _ in range(4):
        lines.look()
    assert told == ["died: expert host host-0: its process ended"]
    assert written(tmp_path) == [JOINED, DIED]


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    lines = EventLines(ScriptedEvents([JOINED], [DIED]), told.append, file=tmp_path / "gone" / EVENTS_FILE)
    lines.look()
    lines.look()
    assert len(told) == 2
    assert "is not written any more" in told[0] and told[1].startswith("died")


class EndedTrainer:
    """A trainer whose run has ended."""

    def fit(self) -> None: ...


class FinishedRun:
    """A coordinator of a run that did not fail."""

    failure = None

    def metrics(self, since: int) -> list[Any]:
        return []


@pytest.mark.timeout(30)
def test_a_run_writes_what_happened_until_its_very_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.training.run_watch, "_POLL_SECONDS", 0.01)
    events = EventLines(ScriptedEvents([JOINED, DIED]), None, file=tmp_path / EVENTS_FILE)
    watch = RunWatch(EndedTrainer(), FinishedRun(), 0, None, events)  # type: ignore[arg-type]
    assert watch.until_done() is False
    assert written(tmp_path) == [JOINED, DIED]
