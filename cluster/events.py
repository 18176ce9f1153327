"""Events of a job: what happened to its hosts, when, in one line each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_KEPT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A recorded event.

    Attributes:
        at: Unix time in seconds.
        kind: One word, such as `joined`, `left`, `died`, `scaled`, `moved`, `failed`, `waiting`.
        text: What happened.
    """

    at: float
    kind: str
    text: str


class EventLog:
    """The latest events of a job, oldest first.

    Attributes:
        recorded: Number of events so far, of which the oldest may not be kept any more.
    """

    def __init__(self) -> None:
        self._kept: deque[Event] = deque(maxlen=_KEPT)
        self.recorded = 0

    def add(self, event: Event) -> None:
        """Record an event."""
        self._kept.append(event)
        self.recorded += 1

    def after(self, known: int) -> list[Event]:
        """The kept events without the first `known` of all that were recorded."""
        unknown = max(0, self.recorded - known)
        return list(self._kept)[max(0, len(self._kept) - unknown) :]

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._kept)

    def __getitem__(self, at: int) -> Event:
        return self._kept[at]


__all__ = ["Event", "EventLog"]
