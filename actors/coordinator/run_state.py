"""State machine of a training run on the coordinator.

    STARTING ──────────────┐                 a new coordinator; hosts are at steps it does not know
                           ▼
    RUNNING ─► INTERRUPTED ─► RECOVERING     a host, a worker or the coordinator was lost
       ▲                          │
       └──────────────────────────┘          all workers begin again at a common step
    any ─► ENDED                             the run failed, or its coordinator is being closed

An attempt is the time between two interruptions. What a worker did in an earlier attempt no longer counts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport
from cluster.topology import HostInfo
from errors import Interrupted, ProtocolError, RaymoeError, is_loss

_HISTORY = 1024  # metrics of steps, and pauses, that are kept
_MOST_FRUITLESS = 5  # interruptions without a step in between; one more ends the run


class RunStatus(StrEnum):
    """What a training run is doing.

    Values:
        STARTING: A new coordinator waits until the hosts are known; workers that join wait too.
        RUNNING: Workers compute and report steps.
        INTERRUPTED: Something that the step needs was lost; calls to hosts that are under way are awaited.
        RECOVERING: The hosts are brought back to a common step.
        ENDED: The run has failed, or the coordinator is being closed; every call raises an error.
    """

    STARTING = "starting"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    RECOVERING = "recovering"
    ENDED = "ended"


_FOLLOWING = {
    RunStatus.STARTING: (RunStatus.RECOVERING, RunStatus.ENDED),
    RunStatus.RUNNING: (RunStatus.STARTING, RunStatus.INTERRUPTED, RunStatus.ENDED),
    RunStatus.INTERRUPTED: (RunStatus.RECOVERING, RunStatus.ENDED),
    RunStatus.RECOVERING: (RunStatus.RUNNING, RunStatus.ENDED),
    RunStatus.ENDED: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPoint:
    """A step that a run was brought back to.

    Attributes:
        step: Optimizer steps behind it.
        bias: `[L, E]` float32, the gates' bias at this step.
        trunk: Hosts that have the trunk's state of this step.
        directory: A checkpoint that has the trunk's state, when no host has it.
    """

    step: int
    bias: Tensor
    trunk: tuple[HostInfo, ...] = ()
    directory: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReports:
    """The reports of all workers of a step, worker 0's first, and the attempt that they belong to."""

    reports: tuple[StepReport, ...]
    attempt: int


class RunState:
    """State of one training run.

    Every method takes the lock. Attributes change with the lock held, except `pauses`, whose appends are
    atomic. Values that have to agree with each other are read with it held, a single one also without
    it.

    Args:
        workers: Workers that report each step.
        step: The first step.
        bias: `[L, E]` float32, the gates' bias at this step.
        on_interrupted: Called with the reason of an interruption, with the lock held; starts the recovery.

    Attributes:
        changed: The lock; notified after every change.
        status: What the run is doing.
        reason: Why it is doing that, when it is not running.
        attempt: Interruptions so far.
        workers: Workers that report each step.
        step: The step whose reports are awaited.
        bias: `[L, E]` float32, the gates' bias of this step.
        metrics: Committed steps, oldest first.
        pauses: Reason and seconds of the times in which no step could run.
    """

    def __init__(
        self, *, workers: int, step: int, bias: Tensor, on_interrupted: Callable[[str], None]
    ) -> None:
        self.changed = threading.Condition()
        self.status, self.reason = RunStatus.RUNNING, ""
        self.attempt, self.workers = 0, workers
        self.step, self.bias = step, bias
        self.metrics: deque[StepMetrics] = deque(maxlen=_HISTORY)
        self.pauses: deque[tuple[str, float]] = deque(maxlen=_HISTORY)
        self._on_interrupted = on_interrupted
        self._joined: set[int] = set()
        self._reports: dict[int, StepReport] = {}
        self._decision: StepDecision | None = None  # of the step before
        self._restart: RestartPoint | None = None  # that the attempt began with
        self._fruitless = 0  # interruptions since the last committed step

    @property
    def failure(self) -> str | None:
        """What ended the run; None before its end."""
        return self.reason if self.status is RunStatus.ENDED else None

    def hold(self, why: str) -> None:
        """Block workers in `join` until the hosts are at a common step."""
        with self.changed:
            if self._move(RunStatus.STARTING, why):
                self.attempt += 1

    def interrupt(self, why: str, attempt: int | None = None) -> None:
        """End the attempt: all workers have to join again, at a step that is known everywhere.

        Further losses change nothing until the run is running again: the recovery takes them into account.

        Args:
            attempt: The attempt in which something was lost; nothing happens if it is over. None: this one.
        """
        with self.changed:
            if attempt not in (None, self.attempt) or not self._move(RunStatus.INTERRUPTED, why):
                return
            self.attempt += 1
            self._joined.clear()
            self._reports.clear()
            self._fruitless += 1
            if self._fruitless > _MOST_FRUITLESS:
                self.end(f"interrupted {self._fruitless} times without a step in between, at last: {why}")
            else:
                self._on_interrupted(why)

    def host_failed(self, text: str, error: BaseException, attempt: int) -> None:
        """A host failed in an attempt: its loss interrupts the run, any other error ends it."""
        with self.changed:
            if attempt == self.attempt:
                if is_loss(error):
                    self.interrupt(text)
                else:
                    self.end(text)

    def begin_recovery(self) -> bool:
        """Begin to bring the hosts back; False if the run has ended."""
        with self.changed:
            return self._move(RunStatus.RECOVERING, self.reason)

    def resume(self, point: RestartPoint, why: str, seconds: float) -> bool:
        """Let the workers begin again at a step; False if the run has ended.

        Args:
            point: The step that the hosts were brought back to.
            why: Reason of the pause.
            seconds: Length of the pause.
        """
        with self.changed:
            if not self._move(RunStatus.RUNNING):
                return False
            self.step, self.bias, self._decision = point.step, point.bias, None
            self._restart = point
            self._reports.clear()
            while self.metrics and self.metrics[-1].step >= point.step:
                self.metrics.pop()
            self.pauses.append((why, seconds))
            return True

    def end(self, why: str) -> None:
        """End the run: every waiting and every later call raises an error with this text."""
        with self.changed:
            self._move(RunStatus.ENDED, why)

    def require_running(self, attempt: int) -> None:
        """Raise unless the run is running in this attempt.

        Raises:
            RaymoeError: The run has ended.
            Interrupted: The attempt is over.
        """
        with self.changed:
            self._require_not_ended()
            if self.status is not RunStatus.RUNNING or self.attempt != attempt:
                raise Interrupted(f"the step is given up: {self.reason or 'it is being done again'}")

    def join(self, rank: int, workers: int, attempt: int, why: str, timeout: float | None) -> Resume:
        """Add a worker, and wait until the run is running; see `TrainingSteps.join` for the arguments."""
        with self.changed:
            self._require_not_ended()
            # A new process lacks the state of the steps taken; the earlier process of this rank may be dead.
            is_new = attempt < 0 and (rank in self._joined or self._decision is not None)
            if self.attempt == attempt or is_new:
                self.interrupt(why or f"worker {rank} was started again")
            self._joined.add(rank)
            self.workers = workers
            ready = self.changed.wait_for(
                lambda: self.status in (RunStatus.RUNNING, RunStatus.ENDED), timeout
            )
            self._require_not_ended()
            if not ready:
                raise Interrupted("the run is being brought back to a common step; join again")
            self._joined.add(rank)
            return Resume(
                attempt=self.attempt,
                step=self.step,
                trunk=() if self._restart is None else self._restart.trunk,
                directory=None if self._restart is None else self._restart.directory,
            )

    def add_report(self, report: StepReport) -> StepReports | StepDecision:
        """Take a worker's report of the step, and wait for the step's decision.

        Returns:
            The decision; or, for the one call whose report completes the step, the reports to decide by.

        Raises:
            Interrupted: The step is given up; the worker has to join again.
            ProtocolError: The report is of another step than the current one or the one before.
            RaymoeError: The run has ended.
        """
        with self.changed:
            attempt = self.attempt
            self.require_running(attempt)
            if report.worker not in self._joined:  # its work belongs to an attempt that is over
                raise Interrupted(f"worker {report.worker} has not joined since the last interruption")
            if self._decision is not None and report.step == self._decision.step:
                return self._decision
            if report.step != self.step:
                raise ProtocolError(
                    f"worker {report.worker} reports step {report.step}, but the run is at step {self.step}"
                )
            is_repeat = report.worker in self._reports
            self._reports[report.worker] = report
            if is_repeat or len(self._reports) < self.workers:
                return self._await_decision(report, attempt)
            reports = tuple(self._reports[worker] for worker in sorted(self._reports))
            return StepReports(reports=reports, attempt=attempt)

    def commit_step(self, decision: StepDecision, metrics: StepMetrics, attempt: int) -> None:
        """Publish the decision of a step, and begin the next step.

        Raises:
            Interrupted: The attempt is over; the step does not count.
            RaymoeError: The run has ended.
        """
        with self.changed:
            self.require_running(attempt)
            self._decision, self.bias, self.step = decision, decision.bias, decision.step + 1
            self._fruitless = 0
            self._reports.clear()
            self.metrics.append(metrics)
            self.changed.notify_all()

    def _move(self, status: RunStatus, reason: str = "") -> bool:
        """Change the status, with the lock held; False, and no change, if the diagram has no such arrow."""
        if status not in _FOLLOWING[self.status]:
            return False
        self.reason, self.status = reason, status  # in this order: `failure` is read without the lock
        self.changed.notify_all()
        return True

    def _await_decision(self, report: StepReport, attempt: int) -> StepDecision:
        """Wait, with the lock held, for the decision that the call with the last report makes."""
        self.changed.wait_for(
            lambda: self.step > report.step or self.status is RunStatus.ENDED or self.attempt != attempt
        )
        self.require_running(attempt)
        if self._decision is None or self._decision.step != report.step:
            raise ProtocolError(
                f"worker {report.worker} waits for step {report.step}, but the run is at {self.step}"
            )
        return self._decision

    def _require_not_ended(self) -> None:
        if self.status is RunStatus.ENDED:
            raise RaymoeError(self.reason)


__all__ = ["RunState", "RunStatus"]
