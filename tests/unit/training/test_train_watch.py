"""The driver's watch over Ray Train, with Ray Train and the coordinator replaced."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

import jobs.training.run_watch
from errors import ChannelError, RaymoeError


class Trainer:
    """A fake trainer that ends when a test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def fit(self) -> None:
        self.done.wait(60)


class FakeCoordinator:
    """A fake coordinator: gives its answers in turn, then the last one again; errors are raised."""

    def __init__(self, *said: str | RaymoeError | None) -> None:
        self._said = list(said)

    @property
    def failure(self) -> str | None:
        found = self._said.pop(0) if len(self._said) > 1 else self._said[0]
        if isinstance(found, RaymoeError):
            raise found
        return found

    def metrics(self, since: int) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.training.run_watch, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(jobs.training.run_watch, "_STRAGGLER_SECONDS", 0.05)


@pytest.mark.timeout(30)
def test_a_run_that_failed_ends_though_a_worker_waits_for_the_one_that_did() -> None:
    trainer = Trainer()
    said = FakeCoordinator(None, ChannelError("away"), "worker 1: by mistake")
    watch = jobs.training.run_watch.RunWatch(trainer, said, 0, None)  # type: ignore[arg-type]
    with pytest.raises(RaymoeError, match="worker 1: by mistake"):
        watch.until_done()
    assert not trainer.done.is_set()
    trainer.done.set()


@pytest.mark.timeout(30)
def test_a_run_that_goes_on_is_waited_for() -> None:
    trainer = Trainer()
    watch = jobs.training.run_watch.RunWatch(trainer, FakeCoordinator(None), 0, None)  # type: ignore[arg-type]
    threading.Timer(0.3, trainer.done.set).start()
    assert watch.until_done() is False


@pytest.mark.timeout(30)
@pytest.mark.parametrize("again", [False, True])
def test_signals_that_come_together_are_one_request(again: bool) -> None:
    """As when a process and its group are signalled at a time; a later signal ends the run at once."""
    trainer = Trainer()

    class Stopping(FakeCoordinator):
        def request_stop(self) -> None:
            if again:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                trainer.done.set()

    watch = jobs.training.run_watch.RunWatch(trainer, Stopping(None), 0, None)  # type: ignore[arg-type]

    def fit(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        Trainer.fit(trainer)

    trainer.fit = lambda: fit(trainer)  # type: ignore[method-assign]
    if again:
        with pytest.raises(KeyboardInterrupt):
            watch.until_done()
        trainer.done.set()
    else:
        assert watch.until_done() is True
