"""What the watch over HAProxy does about ends, faults, and changes of keys and certificates."""

from __future__ import annotations

import pytest

from errors import ConfigError, ResourceError
from jobs.serving.front.haproxy_watch import HaproxyWatch

OLD, NEW = frozenset({"old"}), frozenset({"new"})


class FakeHaproxy:
    """A process that a test ends, and whose calls fail as a test says."""

    def __init__(self) -> None:
        self.pid: int | None = 1
        self.digests = OLD
        self.changed = False
        self.broken: dict[str, Exception] = {}

    def start(self, digests: frozenset[str]) -> None:
        self._fail("start")
        self.pid, self.digests = (self.pid or 1) + 1, digests

    def exchange_digests(self, digests: frozenset[str]) -> None:
        self._fail("exchange")
        self.digests = digests

    def follow_certificate(self) -> bool:
        self._fail("certificate")
        changed, self.changed = self.changed, False
        return changed

    def _fail(self, call: str) -> None:
        if call in self.broken:
            raise self.broken[call]


class Scene:
    """A watch with a clock that is turned by hand; it looks every second."""

    def __init__(self) -> None:
        self.now, self.told, self.current = 0.0, list[str](), OLD
        self.process = FakeHaproxy()
        self.watch = HaproxyWatch(
            self.process, lambda: self.current, self.told.append, clock=lambda: self.now
        )

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1.0
            self.watch.look()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_process_that_ends_is_started_with_the_keys_of_now(scene: Scene) -> None:
    scene.look()
    scene.process.pid, scene.current = None, NEW
    scene.look(3)
    assert scene.process.pid is not None and scene.process.digests == NEW
    assert scene.told == ["its HAProxy has ended, and is started again"]
    assert scene.watch.fault() is None


def test_keys_that_cannot_be_exchanged_are_tried_again(scene: Scene) -> None:
    scene.current = NEW
    scene.process.broken["exchange"] = OSError("no answer")
    scene.look(3)
    assert scene.process.digests == OLD and scene.told == ["no answer"]
    scene.process.broken.clear()
    scene.look()
    assert scene.process.digests == NEW


def test_a_process_that_cannot_be_started_is_a_fault_after_a_while_and_told_once(scene: Scene) -> None:
    scene.process.pid = None
    scene.process.broken["start"] = ResourceError("--port 8000 is not available")
    scene.look()
    assert scene.watch.fault() is None
    scene.look(11)
    assert scene.watch.fault() == "--port 8000 is not available"
    assert scene.told == ["its HAProxy has ended, and is started again", "--port 8000 is not available"]
    scene.process.broken.clear()
    scene.look()
    assert scene.watch.fault() is None


def test_a_start_that_takes_long_is_no_fault(scene: Scene) -> None:
    scene.look()
    scene.now += 60.0  # as long as a busy machine may take, within one look
    assert scene.watch.fault() is None


def test_a_certificate_that_cannot_be_used_leaves_the_process_running(scene: Scene) -> None:
    """A front that was given up for it could not start again, and nobody would reach the model."""
    scene.process.broken["certificate"] = ConfigError("tls.crt cannot be read")
    scene.look(100)
    assert scene.watch.fault() is None
    assert scene.told == ["tls.crt cannot be read"]
    scene.process.broken.clear()
    scene.look()
    scene.process.broken["certificate"] = ConfigError("tls.crt cannot be read")
    scene.look(5)
    assert len(scene.told) == 2  # it is another fault
    scene.process.broken.clear()
    scene.process.changed = True
    scene.look(3)
    assert scene.told[2:] == ["its certificate was read again, and is in use"]
