"""The timeline of a run: spans of every process for the chosen steps, in one trace file."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.messages.timeline import MERGED, Timeline, merge, profiled


def events(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["traceEvents"]
    return found


def test_only_the_chosen_steps_are_recorded_and_written_after_the_last(tmp_path: Path) -> None:
    timeline = Timeline("worker-0", range(2, 4), tmp_path)
    for step in range(6):
        with timeline.span(step, "forward", rows=7):
            pass
        timeline.done(step)
        assert (tmp_path / "worker-0.json").exists() == (step >= 3)
    spans = [event for event in events(tmp_path / "worker-0.json") if event["ph"] == "X"]
    assert [span["args"] for span in spans] == [{"step": 2, "rows": 7}, {"step": 3, "rows": 7}]
    assert all(span["dur"] >= 0 for span in spans) and spans[0]["ts"] <= spans[1]["ts"]


def test_rows_of_the_picture_have_names_and_processes_are_merged(tmp_path: Path) -> None:
    for name in ("worker-0", "host-0"):
        timeline = Timeline(name, range(0, 1), tmp_path)

        def lane(timeline: Timeline = timeline) -> None:
            with timeline.span(0, "backward"):
                pass

        thread = threading.Thread(target=lane, name="lane-1")
        thread.start()
        thread.join()
        with timeline.span(0, "layer 3", track="router"):
            pass
        timeline.done(0)
    whole = merge(tmp_path)
    assert whole == tmp_path / MERGED
    found = events(whole)
    names = {event["args"]["name"] for event in found if event["ph"] == "M"}
    assert names == {"worker-0", "host-0", "lane-1", "router"}
    assert len({event["pid"] for event in found}) == 2
    again = merge(tmp_path)  # what was merged is not merged again
    assert again is not None and len(events(again)) == len(found)


def test_nothing_recorded_is_no_file(tmp_path: Path) -> None:
    Timeline("a", range(0), tmp_path).done(0)
    assert merge(tmp_path) is None


@pytest.mark.parametrize(
    ("first", "count", "last", "steps"),
    [(0, 3, 20, range(2, 5)), (10, 3, 20, range(12, 15)), (0, 30, 20, range(2, 20)), (19, 3, 20, range(0))],
)
def test_steps_after_a_warm_up_within_the_run(first: int, count: int, last: int, steps: range) -> None:
    assert list(profiled(first, count, last)) == list(steps)
