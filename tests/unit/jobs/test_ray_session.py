"""The Ray session of a command, with Ray's functions replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray._private.node import Node

from errors import ConfigError, RaymoeError, ResourceError
from jobs.fleet.ray_session import ResourceNeeds, embeds, ray_session
from jobs.fleet.waiting import telling
from support.waiting import wait_until

NEEDS = ResourceNeeds(cpus=1, why="training.workers (1)")


class FakeRay:
    """Ray's functions: each start makes a session's folder, and fails with the next of `failures`.

    Attributes:
        free: CPUs that the cluster reports, one for each question; the last one stays.
        calls: Names of the functions that have been called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ray"
        self.failures: list[BaseException] = []
        self.free = [8.0]
        self.calls: list[str] = []

    def init(self, **_: object) -> None:
        self.calls.append("init")
        made = Node.__new__(Node)
        made._init_temp()
        if self.failures:
            raise self.failures.pop(0)

    def init_temp(self, made: Any) -> None:
        session = self.folder / f"session_{len(self.calls)}_{os.getpid()}"
        made._session_dir = str(session)
        (session / "logs").mkdir(parents=True)
        latest = self.folder / "session_latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(session)

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def available(self) -> dict[str, float]:
        return {"CPU": self.free.pop(0) if len(self.free) > 1 else self.free[0]}

    @property
    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRay]:
    ray = FakeRay(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", ray.init)
    monkeypatch.setattr(Node, "_init_temp", lambda made: ray.init_temp(made))
    monkeypatch.setattr("ray.shutdown", ray.shutdown)
    monkeypatch.setattr("ray.available_resources", ray.available)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("jobs.fleet.ray_session.running_address", lambda address: address)
    monkeypatch.setattr("jobs.fleet.ray_session._POLL_SECONDS", 0.0)
    monkeypatch.setattr("os.getloadavg", lambda: (40.2, 9.0, 3.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    yield ray


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        (
            None,
            Exception("The node has not started\nmore"),
            "no Ray cluster on this machine: The node has not",
        ),
        (None, ValueError(), "no Ray cluster on this machine: ValueError; "),
        ("auto", ConnectionError("nobody there"), "no Ray cluster at auto: nobody there; check --address"),
    ],
)
def test_a_cluster_that_does_not_start_is_one_line(
    fake: FakeRay, address: str | None, error: Exception, said: str
) -> None:
    fake.failures = [error] * 3
    with pytest.raises(ResourceError) as caught, ray_session(NEEDS, address=address):
        pass
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if address is None:
        assert "this machine is busy (load 40 on 2 cores): wait until it is less so" in str(caught.value)
        assert str(caught.value).endswith("; --debug says more")


def test_a_start_that_fails_is_tried_again_and_leaves_nothing(fake: FakeRay) -> None:
    fake.failures = [Exception("The node timed out."), RuntimeError("no port")]
    told: list[str] = []
    with ray_session(NEEDS, address=None, tell=told.append) as started:
        assert started
        assert fake.left == [f"session_5_{os.getpid()}", "session_latest"]
    assert told == [
        "Ray did not start (The node timed out); trying again (load 40 on 2 cores)",
        "Ray did not start (no port); trying again (load 40 on 2 cores)",
    ]
    assert fake.calls == ["init", "shutdown"] * 3
    assert fake.left == []


@pytest.mark.timeout(30)
def test_a_slow_start_says_what_it_waits_for_and_how_busy_the_machine_is(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def slow(**options: object) -> None:
        wait_until(lambda: len(told) > 1)
        fake.init(**options)

    monkeypatch.setattr("ray.init", slow)
    monkeypatch.setattr("jobs.fleet.ray_start.telling", partial(telling, every=0.01))
    with ray_session(NEEDS, address=None, tell=told.append):
        assert set(told) == {"waiting for Ray (load 40 on 2 cores)"}
        before = len(told)
    assert len(told) == before, "once Ray has started nothing is waited for"


@pytest.mark.parametrize(
    ("error", "kept"),
    [(RaymoeError("a host failed"), True), (ConfigError("a bad field"), False), (KeyboardInterrupt(), False)],
)
def test_logs_stay_where_they_explain_a_failure(fake: FakeRay, error: BaseException, kept: bool) -> None:
    told: list[str] = []
    with pytest.raises(type(error)), ray_session(NEEDS, address=None, tell=told.append):
        raise error
    session = f"session_1_{os.getpid()}"
    assert fake.left == ([session, "session_latest"] if kept else [])
    assert told == ([f"logs of Ray and its actors: {fake.folder / session / 'logs'}"] if kept else [])


def test_a_signal_ends_the_start_without_another_try(fake: FakeRay) -> None:
    fake.failures = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt), ray_session(NEEDS, address=None):
        pass
    assert fake.calls == ["init", "shutdown"]
    assert fake.left == []


def test_the_folder_of_another_process_with_the_same_number_stays(fake: FakeRay) -> None:
    """As two containers have them that share a folder of temporary files."""
    other = fake.folder / f"session_of_another_{os.getpid()}"
    fake.failures = [Exception("no port")]
    with ray_session(NEEDS, address=None):
        other.mkdir()
    assert fake.left == [other.name]


@pytest.mark.parametrize("address", [None, ""])
def test_an_empty_address_starts_a_cluster(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert embeds(address)
    with ray_session(NEEDS, address=address) as started:
        assert started
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not embeds(address)
    with ray_session(NEEDS, address=address) as started:
        assert not started


def test_resources_that_a_new_node_reports_late_are_waited_for(fake: FakeRay) -> None:
    fake.free = [0.0, 0.0, 8.0]
    with ray_session(NEEDS, address=None):
        pass
    many = ResourceNeeds(cpus=9, why="training.workers (9)")
    said = re.escape("8 CPUs free, and 9 are asked for: training.workers")
    with pytest.raises(ResourceError, match=said), ray_session(many, address=None):
        pass
    assert fake.left == []
