"""The watch over a deployment's trunk replicas and interface processes, which keeps their events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.events import Event, EventLog
from errors import RaymoeError
from jobs.serving.pool.process_inquiry import ProcessInquiry
from jobs.serving.pool.process_losses import LOOK_SECONDS, ProcessLosses, ProcessSigns

log = logging.getLogger(__name__)


class EventRecorder(Protocol):
    """The call of a `CoordinatorClient` that `ProcessWatch` needs."""

    def record(self, event: Event) -> None:
        """Add an event to those of the job; a repeat does nothing."""


@dataclass(slots=True)
class ProcessWatch:
    """Looks at the processes every second; used in one event loop.

    Args:
        losses: Decides what is told.
        recorder: Client of the job's coordinator, which gets every event; None without one.
        inquire: Asks Ray about suspects; called in a thread.

    Attributes:
        events: What has been told.
    """

    losses: ProcessLosses
    recorder: EventRecorder | None
    inquire: Callable[[Mapping[str, str]], ProcessSigns] = field(default_factory=ProcessInquiry)
    events: EventLog = field(default_factory=EventLog)
    _recorded: int = 0
    _failure: str | None = None
    _watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look again and again from now on; a repeat does nothing."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Look no more."""
        if self._watching is not None:
            self._watching.cancel()

    async def look(self) -> None:
        """Keep the events since the last look, and give the coordinator those that it does not have."""
        suspects = self.losses.suspects()
        signs = await asyncio.to_thread(self.inquire, suspects) if suspects else ProcessSigns()
        for event in self.losses.look(signs):
            self.events.add(event)
        if self.recorder is not None and self._recorded < self.events.recorded:
            await self._record(self.recorder)

    async def _record(self, recorder: EventRecorder) -> None:
        for event in self.events.after(self._recorded):
            try:
                await asyncio.to_thread(recorder.record, event)
            except RaymoeError:  # the coordinator is being replaced; it gets the rest at the next look
                return
            self._recorded += 1

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except Exception as error:  # the next look may succeed, and a watch that ended would tell nothing
                failure = f"{type(error).__name__}: {error}"
                if failure != self._failure:  # one line for a failure that repeats every second
                    log.exception("the watch over the deployment's processes failed; it looks again")
                self._failure = failure
            else:
                self._failure = None


__all__ = ["EventRecorder", "ProcessWatch"]
