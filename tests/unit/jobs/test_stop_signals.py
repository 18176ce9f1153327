"""Ctrl-C and SIGTERM while a command starts, runs and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from jobs.fleet.stop_signals import Stopped, StopSignals
from jobs.tools.demo import main
from support.waiting import wait_until

# The main thread is in a call that does not return when SIGTERM comes; another thread takes the signal.
_STUCK = """
import ctypes, signal
from jobs.fleet.stop_signals import StopSignals
with StopSignals(grace=0.0).watched():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ctypes.CDLL(None).system(b"echo $$; kill -TERM $PPID; exec sleep 1000")
"""


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_a_start(number: signal.Signals, raised: type[BaseException]) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    cleaned = False
    with pytest.raises(BaseException) as caught, StopSignals().watched():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the end
            cleaned = True
    assert caught.type is raised
    assert cleaned
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_running_job_gets_the_signals_and_its_end_is_not_disturbed() -> None:
    got = []
    with StopSignals().watched() as stop:
        with stop.running(lambda: got.append("stop")):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert got == ["stop", "stop"]


def test_a_start_that_does_not_answer_is_ended_with_its_processes() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == "stopped without waiting for what was under way\n"
    with suppress(psutil.NoSuchProcess):  # the signal to the child was sent, and may still be on its way
        child = psutil.Process(int(out))
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)


def test_sigterm_while_the_demo_starts_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setitem(sys.modules, "jobs.training.train", SimpleNamespace(train=train))
    main(tmp_path)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "stopped before the first step; no checkpoint was written"


class _Loses:
    """Loses the signal that comes in its destructor."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(9):  # bytecode, between which handlers run
            pass


def test_a_signal_that_was_lost_in_a_destructor_is_sent_again() -> None:
    with pytest.raises(Stopped), StopSignals().watched():
        _Loses()
        while True:
            signal.pause()


# Handlers of forks that have to run to their ends, as libraries have, and SIGTERM in the midst of them.
_FORKING = """
import os, signal, subprocess, sys
from jobs.fleet.stop_signals import StopSignals
def stop(): os.kill(os.getpid(), signal.SIGTERM)
def before():
    stop()
    begun.append(1)
def in_child():
    stop()
    begun.pop()
begun = []
os.register_at_fork(before=before, after_in_parent=lambda: begun.pop(), after_in_child=in_child)
try:
    with StopSignals().watched():
        child = subprocess.Popen(["sleep", "1000"], preexec_fn=stop)
        signal.pause()
finally:
    child.kill()
    print(child.wait(), len(begun))
"""


def test_a_signal_while_a_process_is_started_waits_until_it_is_known() -> None:
    done = subprocess.run([sys.executable, "-c", _FORKING], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{-signal.SIGKILL} 0\n", done.stderr
    assert done.stderr.splitlines()[-1] == "jobs.fleet.stop_signals.Stopped"
    assert "ignored" not in done.stderr


def test_a_signal_that_was_lost_in_a_destructor_stops_the_start_at_the_next_check(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Stopped), StopSignals().watched() as stop:
        stop.check()
        _Loses()
        with stop.running():
            raise AssertionError("the job must not run")
    assert capsys.readouterr().err == ""
