"""The steps of a training run as its workers call them: join, report, and the decision that all of them get.

`RunState` is the state machine behind the calls, `TwoPhaseCommit` ends a step on the expert hosts, `Recovery`
brings the hosts back to a common step after a loss.

Locks: `TwoPhaseCommit.lock` is held while the hosts are commanded, by a step, a checkpoint or a recovery,
until its end. Within it `RunState.changed` is taken for moments, and within that the lock of the published
tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.recovery import Beginning, Recovery
from actors.coordinator.run_state import RunState, RunStatus, StepReports
from actors.coordinator.two_phase_commit import TwoPhaseCommit
from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport, TrainingPlan
from cluster.topology import RoutingTable
from errors import CheckpointError, Interrupted, ProtocolError, RaymoeError, is_loss


class TrainingSteps:
    """The steps of one training run. All methods may be called from several threads at the same time.

    Args:
        plan: Schedules and sizes.
        shape: (L, E): MoE layers and routed experts.
        placements: The hosts and what they hold; None with experts in the workers' processes.
        beginning: Finds the checkpoint to restart from; None if there is none.
        step: The first step.
        bias: `[L, E]` float32, the gates' bias at the first step; None for zeros.
        note: Records an event, given its kind and its text.

    Attributes:
        total: Optimizer steps of the whole run.

    Raises:
        CheckpointError: The bias has another shape or type.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        shape: tuple[int, int],
        placements: PlacementController | None,
        *,
        beginning: Callable[[], Beginning] | None = None,
        step: int = 0,
        bias: Tensor | None = None,
        note: Callable[[str, str], None] | None = None,
    ) -> None:
        self.total = plan.steps
        self._shape, self._placements = shape, placements
        bias = torch.zeros(shape) if bias is None else bias.clone()
        if tuple(bias.shape) != shape or bias.dtype != torch.float32:
            raise CheckpointError(
                f"the gates' bias is {list(bias.shape)} of {bias.dtype}, the model needs {list(shape)} of "
                "float32"
            )
        self._state = RunState(
            workers=plan.workers, step=step, bias=bias, on_interrupted=lambda why: self._recovery.start(why)
        )
        self._commits = TwoPhaseCommit(plan, self._state, placements)
        self._recovery = Recovery(self._state, self._commits, placements, beginning, note)

    @property
    def step(self) -> int:
        """The step whose reports are awaited."""
        return self._state.step

    @property
    def attempt(self) -> int:
        """Interruptions so far."""
        return self._state.attempt

    @property
    def workers(self) -> int:
        """Workers that report each step."""
        return self._state.workers

    @property
    def failure(self) -> str | None:
        """What ended the run; None before its end."""
        return self._state.failure

    @property
    def pauses(self) -> Sequence[tuple[str, float]]:
        """Reason and seconds of the times in which no step could run, oldest first."""
        return self._state.pauses

    def table(self) -> RoutingTable:
        """The routing table.

        Raises:
            Interrupted: Experts are without a host.
        """
        found = None if self._placements is None else self._placements.published.complete(0.0)
        if found is None:
            raise Interrupted("experts are without a host; join again")
        return found

    def placed(self) -> None:
        """Take a first snapshot once the hosts have their experts, so that a loss needs no checkpoint."""
        with self._commits.lock, suppress(RaymoeError):
            self._commits.take_snapshot(self._state.step, self._state.bias)

    def hold(self, why: str) -> None:
        """Block workers in `join` until `recover` has ended, since the hosts' steps are not known."""
        self._state.hold(why)

    def recover(self) -> None:
        """Bring the hosts to a common step, in the background, for a run that is held."""
        if self._state.status is RunStatus.STARTING:
            self._recovery.start(self._state.reason)

    def join(self, rank: int, workers: int, attempt: int, why: str, timeout: float | None = None) -> Resume:
        """Add a worker, when its process begins or after it gave up a step; waits until the run is running.

        Args:
            rank: Rank of the worker.
            workers: Workers of the run.
            attempt: The attempt that the worker was part of; -1 for a new process.
            why: Why it gave up; empty for a new process.
            timeout: Seconds to wait; None waits without a limit.

        Returns:
            Where the worker begins.

        Raises:
            Interrupted: The run is not running after `timeout` seconds.
            RaymoeError: The run has failed.
        """
        return self._state.join(rank, workers, attempt, why, timeout)

    def interrupt(self, why: str, attempt: int | None = None) -> None:
        """End the attempt: all workers have to join again, at a step that is known everywhere.

        Args:
            why: What was lost.
            attempt: The attempt in which it was lost; nothing happens if it is over. None: this one.
        """
        self._state.interrupt(why, attempt)

    def lost(self, host: str, why: str) -> None:
        """Interrupt the run if a dead host held experts."""
        with self._state.changed:
            if not self._commits.intact:
                self._state.interrupt(f"expert host {host}: {why}")

    def report(self, report: StepReport) -> StepDecision:
        """End a step: waits until every worker has reported it; all get the same decision.

        A repeated report, while the step is open or after it, has no effect and gets that decision.

        Raises:
            Interrupted: The step is given up; the worker has to join again.
            ProtocolError: The report is of another step than the current one or the one before, of an unknown
                worker, or has loads of another shape.
            RaymoeError: The run has failed, or the gradient is not finite.
        """
        self._check(report)
        found = self._state.add_report(report)
        return self._commit(found) if isinstance(found, StepReports) else found

    def fail(self, text: str) -> None:
        """End the run: every waiting and every later call raises an error with this text."""
        self._state.end(text)

    def request_stop(self) -> int:
        """Stop, with a checkpoint, at the end of the current step; returns that step."""
        with self._state.changed:
            self._commits.stop_requested = True
            return self._state.step

    def save(self, directory: str, step: int) -> list[str]:
        """Have all hosts write their part of the checkpoint after `step` steps; returns the files' names.

        Raises:
            Interrupted: The run is being brought back to a common step, or was.
            ProtocolError: The run is at another step.
            RaymoeError: A host failed to commit or to write.
        """
        with self._commits.lock:
            with self._state.changed:
                attempt = self._state.attempt
                self._state.require_running(attempt)
                if step != self._state.step:
                    kind = Interrupted if attempt else ProtocolError
                    raise kind(
                        f"a checkpoint after {step} steps was asked for, the run is at {self._state.step}"
                    )
            files = self._commits.save(directory)
            self._state.require_running(attempt)
        return files

    def bias(self) -> Tensor:
        """`[L, E]` float32, the gates' bias of the current step."""
        with self._state.changed:
            return self._state.bias.clone()

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """Metrics of the committed steps after `since_step`, oldest first; only the latest are kept."""
        with self._state.changed:
            return [one for one in self._state.metrics if one.step > since_step]

    def close(self) -> None:
        """Raise an error in every waiting call, and end the threads."""
        self.fail("the coordinator has been closed")
        self._commits.close()

    def _commit(self, reports: StepReports) -> StepDecision:
        """Commit a step; a loss interrupts the run, any other failure ends it."""
        attempt = reports.attempt
        try:
            with self._commits.lock:
                return self._commits.commit(reports)
        except Interrupted:
            raise
        except RaymoeError as error:
            self._state.host_failed(str(error), error, attempt)
            if is_loss(error) or self._state.attempt != attempt:
                raise Interrupted(str(error)) from error
            raise
        except Exception as error:
            step = reports.reports[0].step
            text = f"the coordinator failed at step {step}: {type(error).__name__}: {error}"
            self.fail(text)
            raise RaymoeError(text) from error

    def _check(self, report: StepReport) -> None:
        """Refuse a report that cannot be one of this run's."""
        if not 0 <= report.worker < self.workers:
            raise ProtocolError(f"worker {report.worker} is unknown: the run has {self.workers} workers")
        if tuple(report.loads.shape) != self._shape or report.loads.dtype != torch.int64:
            raise ProtocolError(
                f"worker {report.worker} reports loads {list(report.loads.shape)} of {report.loads.dtype}, "
                f"not {list(self._shape)} of int64"
            )


__all__ = ["Beginning", "TrainingSteps"]
