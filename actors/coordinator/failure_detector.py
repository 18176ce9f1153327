"""Failure detector of the expert hosts: pings each several times before its silence counts as death."""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.coordinator.host_roster import HostRoster, silence

PINGS_PER_DEATH = 4  # pings that a host leaves unanswered before it is declared dead


class FailureDetector:
    """Pings the hosts and declares silent ones dead. `look` is called every `pause` seconds.

    Args:
        hosts: The hosts.
        dead_after: Seconds of silence after which a host is declared dead.
        clock: Seconds; never set back.
    """

    def __init__(
        self, hosts: HostRoster, dead_after: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hosts, self._dead_after, self._clock = hosts, dead_after, clock
        self._looked: float | None = None

    @property
    def pause(self) -> float:
        """Seconds between two looks."""
        return self._dead_after / PINGS_PER_DEATH

    def look(self) -> None:
        """Ping all hosts, and declare those dead that have been silent for too long.

        If this process itself was suspended, or had no CPU time, since the last look, it cannot tell which
        hosts answered: their silence counts from now on.
        """
        now = self._clock()
        away = self._looked is not None and now - self._looked > 2 * self.pause
        self._looked = now
        if away:
            self._hosts.forgive_silence()
        self._hosts.ping_all(self._dead_after)
        for id in self._hosts.silent(self._dead_after):
            self._hosts.lose(id, silence(self._dead_after))


__all__ = ["PINGS_PER_DEATH", "FailureDetector"]
