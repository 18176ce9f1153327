"""Events of a running job, followed through its coordinator or pool: as lines for its user, and in a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Protocol

from actors.rpc.admin_client import AdminClient
from errors import RaymoeError

EVENTS_FILE: Final = "events.jsonl"
"""Name of the file in a run's directory: one JSON object a line, with `at` (Unix time), `kind` and `text`."""

NOTABLE: Final = frozenset(
    (
        *("died", "replaced", "returned", "failed", "waiting", "interrupted", "resumed", "restarted"),
        *("scaling", "scaled", "autoscaled", "draining", "left", "reloaded", "front", "keys"),
    )
)
"""Kinds of events that a job's user is told: deaths, rollbacks, changes of hosts, weights or API keys."""

_PAUSE = 0.5  # seconds
_CALL_SECONDS = 2.0


class EventSource(Protocol):
    """The call of an `AdminClient` or of `PoolEvents` that `EventLines` needs."""

    def events(self) -> list[dict[str, Any]]:
        """The events that have not been returned before, oldest first."""


class EventLines:
    """Tells new events in one line each, and appends them to a file. `look` is called again and again.

    Args:
        source: Client of the job's coordinator or pool.
        tell: Called with a line for each event that is told; None tells none.
        file: Gets every event; None writes none.
        kinds: Kinds that are told; None tells all.
    """

    def __init__(
        self,
        source: EventSource,
        tell: Callable[[str], object] | None,
        *,
        file: Path | None = None,
        kinds: Collection[str] | None = NOTABLE,
    ) -> None:
        self._source, self._tell = source, tell
        self._file, self._kinds = file, kinds

    def look(self) -> None:
        """Report and write the events since the last call; nothing while the coordinator is unreachable."""
        try:
            events = self._source.events()
        except RaymoeError:
            return
        if events and self._file is not None:
            self._write(self._file, events)
        for event in events:
            if self._tell is not None and (self._kinds is None or event["kind"] in self._kinds):
                self._tell(f"{event['kind']}: {event['text']}")

    def _write(self, file: Path, events: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(lines)
        except OSError as error:
            self._file = None
            if self._tell is not None:
                self._tell(f"{file} is not written any more: {error}")


def follow_events(
    stop: threading.Event,
    coordinator: str,
    tell: Callable[[str], object],
    *,
    kinds: Collection[str] | None = NOTABLE,
    skip: bool = False,
) -> None:
    """Tell the events of a job with a coordinator until `stop` is set.

    Args:
        stop: Ends the wait.
        coordinator: Address of the job's coordinator.
        tell: Called with a line for each event.
        kinds: Kinds that are told; None tells all.
        skip: Leave out what has happened before.
    """
    with closing(AdminClient(coordinator, timeout=_CALL_SECONDS)) as client:
        if skip:
            EventLines(client, None).look()
        follow_source(stop, client, tell, kinds=kinds)


def follow_source(
    stop: threading.Event,
    source: EventSource,
    tell: Callable[[str], object],
    *,
    kinds: Collection[str] | None = NOTABLE,
    every: float = _PAUSE,
) -> None:
    """Tell the events of a source until `stop` is set.

    Args:
        stop: Ends the wait.
        source: Asked again and again.
        tell: Called with a line for each event.
        kinds: Kinds that are told; None tells all.
        every: Seconds between two questions.
    """
    lines = EventLines(source, tell, kinds=kinds)
    while not stop.wait(every):
        lines.look()
    lines.look()


__all__ = ["EVENTS_FILE", "NOTABLE", "EventLines", "EventSource", "follow_events", "follow_source"]
