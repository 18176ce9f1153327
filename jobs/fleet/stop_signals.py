"""Ctrl-C and SIGTERM while a command starts its job: it ends within seconds, and cleans up."""

from __future__ import annotations

import enum
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_GRACE_SECONDS = 15.0  # that a command has to end in order, before it is ended at once
_AGAIN_SECONDS = 0.05  # after which a signal that stopped nothing is sent again
_INTERRUPTED = 130  # exit code after Ctrl-C, by convention of shells
_EXECUTE_CHILD = subprocess.Popen._execute_child.__code__  # type: ignore[attr-defined]


class Stopped(KeyboardInterrupt):
    """Raised when SIGTERM stops a command before its job runs; the command exits with code 0."""


class _CommandPhase(enum.Enum):
    STARTING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


class StopSignals:
    """Handles Ctrl-C and SIGTERM in a command's main thread.

    While the job starts, the first signal raises `KeyboardInterrupt`. It is sent again if the exception went
    no further than a destructor or a callback, and once a process that is just being started is known. A call
    that does not return to Python, as some of Ray's, would delay the end; so a thread ends the process and
    its children if it has not ended after some seconds. While the job runs, signals go to its own handler.
    While it ends, SIGTERM has no effect.

    Args:
        grace: Seconds that a command has to end in order.
        leave: Ends the process with an exit code, without cleaning up.
    """

    def __init__(self, *, grace: float = _GRACE_SECONDS, leave: Callable[[int], object] = os._exit) -> None:
        self._grace = grace
        self._leave = leave
        self._phase = _CommandPhase.STARTING
        self._first = 0  # number of the signal that stops the start
        self._again = False  # it has to be sent again
        self._main = threading.get_ident()
        self._finished = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[StopSignals]:
        """Handle the signals within this context, which has to be entered in the main thread.

        Raises:
            Stopped: SIGTERM came while the job started.
        """
        self._main = threading.get_ident()
        handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        ours, waker = socket.socketpair()
        waker.setblocking(False)
        before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(ours,), name="stop-signals", daemon=True)
        thread.start()
        hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        try:
            yield self
        except KeyboardInterrupt:
            if self._first == signal.SIGTERM:
                raise Stopped from None
            raise
        finally:
            self._finished.set()
            sys.unraisablehook = hook
            signal.set_wakeup_fd(before)
            waker.close()
            thread.join()
            ours.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Stop a start whose signal has not stopped it yet.

        Raises:
            KeyboardInterrupt: A signal has come.
        """
        if self._first:
            self._phase, self._again = _CommandPhase.ENDING, False
            raise KeyboardInterrupt

    @contextmanager
    def running(self, stop: Callable[[], object] | None = None) -> Iterator[None]:
        """The job runs within this context, and ends after it.

        Args:
            stop: Called at each signal; None leaves the handlers to the caller.

        Raises:
            KeyboardInterrupt: A signal has come while the job started.
        """
        self.check()
        self._phase = _CommandPhase.RUNNING
        handlers = {}
        if stop is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, lambda *_: stop())
        try:
            yield
        finally:
            self._phase = _CommandPhase.ENDING
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._phase is _CommandPhase.ENDING:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._first = self._first or number
        self._again = _is_starting_a_process(frame)
        if not self._again:
            self._phase = _CommandPhase.ENDING
            raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Print no exception that was lost in a destructor or a callback; its signal is sent again."""
        if self._first and issubclass(lost.exc_type, KeyboardInterrupt):
            self._phase, self._again = _CommandPhase.STARTING, True
        else:
            sys.__unraisablehook__(lost)

    def _watch(self, signals: socket.socket) -> None:
        """End the process if a signal has not ended its start in time; runs in a thread."""
        while numbers := signals.recv(64):
            stopping = [number for number in numbers if number in (signal.SIGINT, signal.SIGTERM)]
            if not stopping or (self._phase is not _CommandPhase.STARTING and not self._first):
                continue
            deadline = time.monotonic() + self._grace
            while (left := deadline - time.monotonic()) > 0:
                if self._finished.wait(min(left, _AGAIN_SECONDS)):
                    return
                if self._again:
                    self._again = False
                    signal.pthread_kill(self._main, self._first)
            import psutil  # not needed otherwise

            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
            print("stopped without waiting for what was under way", file=sys.stderr, flush=True)
            self._leave(0 if stopping[0] == signal.SIGTERM else _INTERRUPTED)
            return


def _is_starting_a_process(frame: FrameType | None) -> bool:
    """Whether a signal came between a fork and the place where the new process becomes known.

    An exception there would leave a process that nobody ends, and libraries' fork handlers half done.
    """
    while frame is not None:
        if frame.f_code is _EXECUTE_CHILD:
            return True
        frame = frame.f_back
    return False


__all__ = ["StopSignals", "Stopped"]
