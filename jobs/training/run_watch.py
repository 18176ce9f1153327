"""Waits for a training run to end, shows its progress, and turns Ctrl-C into a last checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from ray.train.torch import TorchTrainer

from actors.rpc.admin_client import AdminClient
from actors.rpc.coordinator_client import CoordinatorClient
from errors import RaymoeError
from jobs.console import Progress
from jobs.fleet.event_lines import EVENTS_FILE, EventLines
from model.optimizers.schedule import Schedule, value_at

_POLL_SECONDS = 0.5
_EVENT_SECONDS = 5.0  # that the coordinator has to tell of events
_STRAGGLER_SECONDS = 10.0
"""Time in which the other workers of a failed run have to end by themselves."""


class RunWatch:
    """Waits for Ray Train in the main thread, shows progress, and turns Ctrl-C into a last checkpoint.

    Args:
        trainer: Ray Train's trainer, which runs in a thread.
        coordinator: Client of the run's coordinator.
        step: Number of steps done before.
        progress: Shows the steps.
        events: Tells what happens to the run's processes; None tells nothing.
        mtp_weight: λ over the steps, for the loss that is shown.
    """

    def __init__(
        self,
        trainer: TorchTrainer,
        coordinator: CoordinatorClient,
        step: int,
        progress: Progress | None,
        events: EventLines | None = None,
        *,
        mtp_weight: Schedule = 0.0,
    ) -> None:
        self._coordinator, self._events = coordinator, events
        self._mtp_weight = mtp_weight
        self._shown = step - 1
        self._progress = progress
        self._error: BaseException | None = None
        self._failed_at: float | None = None
        self._interrupts = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name="ray-train", daemon=True)

    def until_done(self) -> bool:
        """Run the training until it ends; return whether Ctrl-C ended it.

        Raises:
            RaymoeError: The run failed.
        """
        with self._on_interrupt():
            self._thread.start()
            while self._thread.is_alive():
                self._thread.join(_POLL_SECONDS)
                if self._interrupts and not self._stopping:
                    self._stopping = True
                    self._note(
                        "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once"
                    )
                if self._stopping:
                    with suppress(RaymoeError):  # repeated, because a new coordinator does not know of it
                        self._coordinator.request_stop()
                if self._interrupts > 1:
                    raise KeyboardInterrupt
                self._show()
                self._give_up_on_stragglers()
        self._show()
        reason = self._reason()
        if reason is not None:
            raise reason from self._error
        return self._stopping

    def _give_up_on_stragglers(self) -> None:
        """End a failed run although other workers still wait for the failed one, which can take half an hour.

        Raises:
            RaymoeError: The run failed some time ago.
        """
        try:
            failure = self._coordinator.failure
        except RaymoeError:  # the coordinator is restarting, or gone; then the trainer ends
            return
        if failure is None:
            self._failed_at = None
        elif self._failed_at is None:
            self._failed_at = time.monotonic()
        elif time.monotonic() - self._failed_at > _STRAGGLER_SECONDS:
            raise RaymoeError(failure)

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._error = error

    def _show(self) -> None:
        if self._events is not None:
            self._events.look()
        if self._progress is None:
            return
        try:
            steps = self._coordinator.metrics(self._shown)
        except RaymoeError:  # the run has failed, with the error that Ray Train raises
            return
        for step in steps:
            self._shown = step.step
        if steps:
            self._progress.update(
                steps[-1].step + 1,
                loss=steps[-1].total(value_at(self._mtp_weight, steps[-1].step)),
                tokens_per_second=sum(s.tokens for s in steps) / max(1e-9, sum(s.seconds for s in steps)),
                max_violation=sum(steps[-1].max_violation) / max(1, len(steps[-1].max_violation)),
                note=f"main loss {steps[-1].loss:.3f}",
            )

    def _reason(self) -> RaymoeError | None:
        """The error that ended the run; None if it was completed."""
        try:
            failure = self._coordinator.failure
        except RaymoeError as error:
            return None if self._error is None else error
        if failure is not None:
            return RaymoeError(failure)
        if self._error is None:
            return None
        text = str(self._error).strip().splitlines()
        return RaymoeError(f"training failed: {text[-1] if text else type(self._error).__name__}")

    def _note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)

    @contextmanager
    def _on_interrupt(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(number: int, frame: FrameType | None) -> None:
            # Before the first is acted on, another one is the same request: timeout(1) sends two at a time.
            if not self._interrupts or self._stopping:
                self._interrupts += 1

        # Jobs are stopped from outside with SIGTERM.
        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_events(
    address: str, output: Path, tell: Callable[[str], object] | None, stack: ExitStack
) -> EventLines:
    """The events of a run, written to `events.jsonl` in its directory.

    Args:
        address: Address of the run's coordinator.
        output: The run's directory.
        tell: Called with a line for each notable event.
        stack: Closes the connection.
    """
    client = AdminClient(address, timeout=_EVENT_SECONDS)
    stack.callback(client.close)
    return EventLines(client, tell, file=output / EVENTS_FILE)


__all__ = ["RunWatch", "run_events"]
