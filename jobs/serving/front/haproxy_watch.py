"""The watch over a front's HAProxy: its restart after an end, and changes of API keys and certificates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

_FAULT_SECONDS = 10.0  # of one failure after the other, after which the front is given up


class RestartableProcess(Protocol):
    """What is watched, a `HaproxyProcess`."""

    @property
    def pid(self) -> int | None:
        """Number of the process; None if it does not run."""
        ...

    def start(self, digests: frozenset[str]) -> None:
        """Start the process with these digests of API keys."""
        ...

    def exchange_digests(self, digests: frozenset[str]) -> None:
        """Replace the digests of all API keys at once."""
        ...

    def follow_certificate(self) -> bool:
        """Use what the files of the certificate hold, if they have changed; whether they have."""
        ...


class HaproxyWatch:
    """Keeps an HAProxy running with the API keys and the certificate of now; used by one thread at a time.

    Args:
        process: A process that runs.
        digests: Returns the digests of the API keys, with which the process was started.
        tell: Is given a line about each end of the process and each fault.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        process: RestartableProcess,
        digests: Callable[[], frozenset[str]],
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process, self._current, self._tell, self._clock = process, digests, tell, clock
        self._digests = digests()
        self._failing_since: float | None = None
        self._told = ""

    def look(self) -> None:
        """Start the process if it has ended, and pass on changes; a failure is told and tried again."""
        try:
            self._keep_running()
        except Exception as error:  # whatever it is, the next look may succeed
            if self._failing_since is None:
                self._failing_since = self._clock()
            self._tell_once(str(error))
            return
        self._failing_since = None
        try:
            changed = self._process.follow_certificate()
        except Exception as error:  # the process goes on with the certificate that it has
            self._tell_once(str(error))
            return
        self._told = ""
        if changed:
            self._tell("its certificate was read again, and is in use")

    def fault(self) -> str | None:
        """What has kept the process from running, or its keys from being exchanged, for too long; or None."""
        if self._failing_since is None or self._clock() - self._failing_since <= _FAULT_SECONDS:
            return None
        return self._told

    def _keep_running(self) -> None:
        digests = self._current()
        if self._process.pid is None:
            if self._failing_since is None:
                self._tell("its HAProxy has ended, and is started again")
            self._process.start(digests)
        elif digests != self._digests:
            self._process.exchange_digests(digests)
        self._digests = digests

    def _tell_once(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)


__all__ = ["HaproxyWatch", "RestartableProcess"]
