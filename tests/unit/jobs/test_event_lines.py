"""What a job's user is told of its events, and the file that has all of them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import jobs.fleet.event_lines
import jobs.training.run_watch
from actors.rpc.control_server import ControlServer
from errors import ChannelError
from jobs.fleet.event_lines import EVENTS_FILE, EventLines, follow_events, follow_source
from jobs.training.run_watch import RunWatch
from protos import admin_pb2, admin_pb2_grpc
from support.waiting import wait_until

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


class EventfulJob(admin_pb2_grpc.AdminServicer):
    """A job whose coordinator has recorded one event, and records another one for each call."""

    def __init__(self) -> None:
        self.texts = ["of old"]

    def Events(
        self, request: admin_pb2.EventsRequest, context: grpc.ServicerContext
    ) -> admin_pb2.EventsReply:
        new = [admin_pb2.JobEvent(at=1.0, kind="died", text=text) for text in self.texts[request.known :]]
        reply = admin_pb2.EventsReply(recorder="r", known=len(self.texts), events=new)
        self.texts.append(f"number {len(self.texts)}")
        return reply


@pytest.mark.parametrize(("skip", "first"), [(False, "died: of old"), (True, "died: number 1")])
@pytest.mark.timeout(30)
def test_events_are_followed_until_the_end(skip: bool, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.fleet.event_lines, "_PAUSE", 0.01)
    job, told, stop = EventfulJob(), list[str](), threading.Event()
    server = ControlServer(lambda server: admin_pb2_grpc.add_AdminServicer_to_server(job, server))
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow_events, stop, server.address, told.append, skip=skip)
        wait_until(lambda: len(told) > 3)
        stop.set()
        following.result(20)
    server.close()
    begin = 1 if skip else 0
    assert told[0] == first
    assert told == [f"died: {text}" for text in job.texts[begin : begin + len(told)]], "each event once"


def test_a_source_is_asked_once_more_at_the_end() -> None:
    told, stop = list[str](), threading.Event()
    stop.set()
    follow_source(stop, ScriptedEvents([JOINED, DIED]), told.append)
    assert told == ["died: expert host host-0: its process ended"]
