"""Losses and replacements of a deployment's trunk replicas and interface processes, as events.

Every process asks the pool again as soon as it has its answer (`PoolLink.ask`), so one that has no question
open is suspected. Ray says which suspects answer and how others have ended
(`jobs.serving.pool.process_inquiry`); this module decides what is told, without Ray and without a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from cluster.events import Event

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks at the processes, and of silence after which Ray is asked about one."""

_LEAST_PATIENCE = 5.0  # seconds, of which a busy machine may take some for a look and its answers
_SAME_SECONDS = 5.0  # in which several processes tell of the same
_LONGEST_GAP = 2 * LOOK_SECONDS  # that counts as silence of others; beyond that the pool itself did not run


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnd:
    """How a process ended.

    Attributes:
        why: The reason, as the end of a sentence.
        deliberate: Whether Ray Serve ended it, as it does when it scales a deployment down or deletes it.
    """

    why: str
    deliberate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSigns:
    """What is known of suspects.

    Attributes:
        ends: How those have ended that live no more.
        answered: Names of those that have answered.
    """

    ends: Mapping[str, ProcessEnd] = field(default_factory=dict)
    answered: frozenset[str] = frozenset()


@dataclass(slots=True)
class _WatchedProcess:
    what: str
    actor: str
    joined: float
    asked: float
    heard: float
    silent: float = 0.0
    asking: int = 0
    serves: bool = False
    replaces: bool = False  # it has been told as the replacement of another one
    given_up: bool = False


@dataclass(slots=True)
class ProcessLosses:
    """The trunk replicas and interface processes of a deployment, and which of them are lost or replaced.

    Args:
        dead_after: Seconds of silence after which a process that serves is given up, but five at least.
        clock: Seconds since the epoch, never set.
    """

    dead_after: float
    clock: Callable[[], float] = time.time
    _watched: dict[str, _WatchedProcess] = field(default_factory=dict)
    _lost: dict[str, list[str]] = field(default_factory=dict)  # that nothing has replaced yet, oldest first
    _noted: list[Event] = field(default_factory=list)
    _told: dict[str, Event] = field(default_factory=dict)  # the last that a process told of, by kind
    _looked: float = 0.0
    _closed: bool = False

    def join(self, name: str, actor: str, *, interface: bool) -> None:
        """Watch a process that starts.

        Args:
            name: Its name, unique within the deployment.
            actor: Id of its Ray actor.
            interface: Whether it is a process of the interface, not a trunk replica.
        """
        what = "interface process" if interface else "trunk replica"
        now = self.clock()
        self._watched[name] = _WatchedProcess(what, actor, now, now, now)

    def leave(self, name: str) -> None:
        """Forget a process that ends as Ray Serve asked it to."""
        self._watched.pop(name, None)

    def serve(self, name: str) -> None:
        """Note that a process accepts requests; a repeat does nothing."""
        one = self._watched.get(name)
        if one is None or one.serves:
            return
        one.serves = True
        if lost := self._lost.get(one.what):
            self._replace(lost.pop(0), name, one)

    @contextmanager
    def question(self, name: str) -> Iterator[None]:
        """A question of a process, as long as it is open."""
        one = self._watched.get(name)
        if one is None:
            yield
            return
        self._hear(name, one)
        one.asked = self.clock()
        one.asking += 1
        try:
            yield
        finally:
            one.asking -= 1
            self._hear(name, one)

    def suspects(self) -> dict[str, str]:
        """Names of the processes that Ray should be asked about, with the ids of their actors."""
        now = self.clock()
        return {
            name: one.actor
            for name, one in self._watched.items()
            if not one.asking and now - one.heard >= LOOK_SECONDS
        }

    def look(self, signs: ProcessSigns) -> list[Event]:
        """The events since the last look, oldest first.

        Args:
            signs: What is known of suspects.
        """
        for name in signs.answered & self._watched.keys():
            self._hear(name, self._watched[name])
        for name, end in signs.ends.items():
            ended = self._watched.pop(name, None)
            if ended is not None and not end.deliberate and not ended.given_up:
                self._lose(name, ended, end.why)
        self._count_silence()
        for name, one in self._watched.items():
            if one.silent > self._patience and one.serves and not one.given_up:
                one.given_up = True
                self._lose(name, one, self._silence())
        noted, self._noted = self._noted, []
        return [] if self._closed else noted

    def close(self) -> None:
        """Tell nothing from now on: the deployment shuts down."""
        self._closed = True

    def _hear(self, name: str, one: _WatchedProcess) -> None:
        """Note that a process has asked or answered."""
        one.heard, one.silent = self.clock(), 0.0
        if one.given_up:
            one.given_up = False
            lost = self._lost.get(one.what, [])
            if name in lost:
                lost.remove(name)
            self._note("returned", f"{one.what} {name} answers again")

    def _count_silence(self) -> None:
        now = self.clock()
        for one in self._watched.values():
            if not one.asking:
                one.silent += min(now - max(self._looked, one.heard), _LONGEST_GAP)
        self._looked = now

    def _lose(self, name: str, one: _WatchedProcess, why: str) -> None:
        """Note a loss, and its replacement if that serves already.

        What has not served needs no replacement of its own.
        """
        self._note("died", f"{one.what} {name}: {why}{'' if one.serves else ' before it served'}")
        if not one.serves:
            return
        for other, new in self._watched.items():
            if new.what == one.what and new.serves and not new.replaces and new.joined > one.asked:
                self._replace(name, other, new)
                return
        self._lost.setdefault(one.what, []).append(name)

    def _replace(self, lost: str, name: str, one: _WatchedProcess) -> None:
        one.replaces = True
        self._note("replaced", f"{one.what} {name} serves in place of {lost}")

    @property
    def _patience(self) -> float:
        return max(self.dead_after, _LEAST_PATIENCE)

    def _silence(self) -> str:
        return (
            f"silent for {self._patience:g} s; raise cluster.dead_after above that if it hung for no other "
            "reason than a lack of CPU time"
        )

    def note(self, kind: str, text: str) -> None:
        """Add an event that a process tells of, unless another one has just told the same.

        The same after something else of its kind is news: a fault that ended, and came back.
        """
        last = self._told.get(kind)
        if last is not None and last.text == text and self.clock() - last.at < _SAME_SECONDS:
            return
        self._note(kind, text)
        self._told[kind] = self._noted[-1]

    def _note(self, kind: str, text: str) -> None:
        self._noted.append(Event(at=self.clock(), kind=kind, text=text))


__all__ = ["LOOK_SECONDS", "ProcessEnd", "ProcessLosses", "ProcessSigns"]
