"""Looks after the hosts: asks each several times before its silence counts as death."""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.coordinator.host_roster import Roster

PER_DEATH = 4  # times that a host is asked before it is taken for dead


class Health:
    """To be told to `look` every `pause` seconds.

    Args:
        dead_after: seconds of silence after which a host is taken for dead.
        clock: seconds; never set back.
    """

    def __init__(
        self, hosts: Roster, dead_after: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hosts, self._dead_after, self._clock = hosts, dead_after, clock
        self._looked: float | None = None

    @property
    def pause(self) -> float:
        """Seconds between two looks."""
        return self._dead_after / PER_DEATH

    def look(self) -> None:
        """Ask all hosts, and bury those that have been silent for too long.

        Who was away itself (stopped, or starved of its core) has heard nobody, and begins to listen anew.
        """
        now = self._clock()
        away = self._looked is not None and now - self._looked > 2 * self.pause
        self._looked = now
        if away:
            self._hosts.saw_all()
        self._hosts.ping_all(self._dead_after)
        for id in self._hosts.silent(self._dead_after):
            self._hosts.lose(id, f"silent for {self._dead_after:g} s")


__all__ = ["PER_DEATH", "Health"]
