"""The steps of a training run: reports in, one decision out, committed on all hosts; and back after a loss.

A step ends in two phases. When every worker has reported, the hosts `prepare`: they seal their gradients
and say how large they are. From that follow one clip factor, learning rate and bias: the decision. Then the
hosts `commit` while the workers, who have the decision, already apply their own optimizer; the next step
is not decided before every host has committed this one.

When a host, a worker or a coordinator is lost, the run is interrupted: whoever waits hears it, gives up what
it is at and joins again; meanwhile all experts are brought back to the newest step that is kept in memory, or
to a checkpoint, under a new epoch, which no late request of the old one can reach. An attempt is what lies
between two interruptions.

Locks: `_deciding` is held by whoever commands the hosts, a step's decision or a recovery, to its end;
`_changed` guards what is known of the run, and under it only the published tables are looked at.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from actors.coordinator.placement_changes import Elastic
from actors.coordinator.recovery import Beginning, Recovery, Restored
from actors.coordinator.step_decision import decide, merge
from actors.coordinator.step_hosts import StepHosts
from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport, TrainingPlan
from cluster.topology import HostInfo, RoutingTable
from errors import CheckpointError, Interrupted, ProtocolError, RaymoeError, is_loss

_HISTORY = 1024  # steps of metrics that are kept
_VAIN = 5  # interruptions without a step in between, after which it is no accident


class TrainingSteps:
    """One per training run. All methods may be called from several threads at once.

    Args:
        plan: schedules and sizes.
        shape: (L, E).
        hosts: the expert hosts; None with experts in the workers' processes.
        beginning: says where the run can be begun again, the latest first known.
        step: the first step.
        bias: [L, E] float32.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        shape: tuple[int, int],
        hosts: Elastic | None,
        *,
        beginning: Callable[[], Beginning] | None = None,
        step: int = 0,
        bias: Tensor | None = None,
    ) -> None:
        self._plan, self._shape, self._elastic = plan, shape, hosts
        self._hosts = StepHosts(hosts)
        self._recovery = Recovery(hosts, beginning)
        self._changed = threading.Condition()
        self._deciding = threading.Lock()
        self._failure: str | None = None
        self._stop = False
        self._step = step
        self._bias = torch.zeros(shape) if bias is None else bias.clone()
        if tuple(self._bias.shape) != shape or self._bias.dtype != torch.float32:
            raise CheckpointError(
                f"the gates' bias is {list(self._bias.shape)} of {self._bias.dtype}, "
                f"the model needs {list(shape)} of float32"
            )
        self._workers = plan.workers
        self._attempt = 0
        self._interrupted: str | None = None
        self._joined: set[int] = set()
        self._vain = 0
        self._trunk: tuple[HostInfo, ...] = ()
        self._directory: str | None = None
        self._reports: dict[int, StepReport] = {}
        self._decision: StepDecision | None = None
        self._metrics: deque[StepMetrics] = deque(maxlen=_HISTORY)
        self.pauses: deque[tuple[str, float]] = deque(maxlen=_HISTORY)

    @property
    def step(self) -> int:
        """The step whose reports are awaited."""
        return self._step

    @property
    def attempt(self) -> int:
        """Interruptions so far."""
        return self._attempt

    @property
    def workers(self) -> int:
        """Workers that report each step."""
        return self._workers

    @property
    def failure(self) -> str | None:
        """What ended the run; None while it goes on."""
        return self._failure

    def table(self) -> RoutingTable:
        """The routing table.

        Raises:
            Interrupted: experts are without a host.
        """
        found = None if self._elastic is None else self._elastic.versions.complete(0.0)
        if found is None:
            raise Interrupted("experts are without a host; join again")
        return found

    def founded(self) -> None:
        """The hosts have their experts: let them keep copies, so that a loss needs no checkpoint."""
        with self._deciding:
            self._keep(self._step, self._bias)

    def hold(self, why: str) -> None:
        """Nobody begins before `recover` has been called and is done: hosts are at steps not yet known."""
        with self._changed:
            self._interrupted, self._attempt = why, self._attempt + 1

    def recover(self) -> None:
        """Bring the hosts to a common step, in a thread; for a run that is held."""
        with self._changed:
            why = self._interrupted
        if why is not None:
            threading.Thread(target=self._recover, args=(why,), name="recovery", daemon=True).start()

    def join(self, rank: int, workers: int, attempt: int, why: str, timeout: float | None = None) -> Resume:
        """A worker begins, or begins again after it gave up a step; blocks until everything is ready for it.

        Args:
            attempt: that it was part of; -1 for a process that begins.
            why: it gave up.

        Raises:
            RaymoeError: the run has failed.
        """
        with self._changed:
            self._raise_failure()
            # A process that begins knows no step that has been made here; one of this rank may still be lost.
            late = attempt < 0 and (rank in self._joined or self._decision is not None)
            if self._attempt == attempt or late:
                self._interrupt(why or f"worker {rank} began anew")
            self._joined.add(rank)
            self._workers = workers
            ready = self._changed.wait_for(
                lambda: self._interrupted is None or self._failure is not None, timeout
            )
            self._raise_failure()
            if not ready:
                raise Interrupted("the run is being brought back to a common step; join again")
            self._joined.add(rank)
            return Resume(
                attempt=self._attempt, step=self._step, trunk=self._trunk, directory=self._directory
            )

    def interrupt(self, why: str, attempt: int | None = None) -> None:
        """Something that the step needs is lost: all begin again, at a step that is known everywhere.

        Args:
            attempt: in which it was lost; nothing happens if that one is over.
        """
        with self._changed:
            if attempt is None or attempt == self._attempt:
                self._interrupt(why)

    def lost(self, host: str, why: str) -> None:
        """A host is dead; if it held experts, the run is interrupted."""
        with self._changed:
            if not self._whole():
                self._interrupt(f"expert host {host}: {why}")

    def report(self, report: StepReport) -> StepDecision:
        """End a step: blocks until every worker has reported it, then gives each the same decision.

        A repeat of a report, while the step is open or after it, has no effect and gets that decision.

        Raises:
            Interrupted: the step is given up; join again.
            ProtocolError: another step than the current one or the last, an unknown worker, or loads of
                another shape.
            RaymoeError: another worker failed, or the gradient is not finite.
        """
        with self._changed:
            self._check(report)
            self._raise_failure()
            attempt = self._attempt
            self._raise_interrupted(attempt)
            if report.worker not in self._joined:  # what it did belongs to an attempt that is over
                raise Interrupted(f"worker {report.worker} has not joined since the last interruption")
            last = self._decision
            if last is not None and report.step == last.step:
                return last
            if report.step != self._step:
                raise ProtocolError(
                    f"worker {report.worker} reports step {report.step}, but the run is at step {self._step}"
                )
            mine = report.worker not in self._reports
            self._reports[report.worker] = report
            if not mine or len(self._reports) < self._workers:
                return self._decided(report, attempt)
            reports = [self._reports[worker] for worker in sorted(self._reports)]
        try:
            with self._deciding:
                return self._decide(reports, attempt)
        except Interrupted:
            raise
        except RaymoeError as error:
            self._failed(str(error), error, attempt)
            if is_loss(error) or self._attempt != attempt:
                raise Interrupted(str(error)) from error
            raise
        except Exception as error:
            text = f"the coordinator failed at step {report.step}: {type(error).__name__}: {error}"
            self.fail(text)
            raise RaymoeError(text) from error

    def fail(self, text: str) -> None:
        """End the run: every waiting and every later call raises an error with this text."""
        with self._changed:
            if self._failure is None:
                self._failure = text
            self._changed.notify_all()

    def request_stop(self) -> int:
        """Stop, with a checkpoint, at the next step boundary; the step that will be the last."""
        with self._changed:
            self._stop = True
            return self._step

    def save(self, directory: str, step: int) -> list[str]:
        """Let all hosts write their part of the checkpoint after `step` steps; the files' names.

        Raises:
            Interrupted: the run is being brought back to a common step, or has been.
            ProtocolError: the run is at another step.
            RaymoeError: a host failed to commit or to write.
        """
        with self._deciding:  # so no recovery changes the hosts meanwhile
            with self._changed:
                self._raise_failure()
                attempt = self._attempt
                self._raise_interrupted(attempt)
                if step != self._step:
                    kind = Interrupted if attempt else ProtocolError
                    raise kind(f"a checkpoint after {step} steps was asked for, the run is at {self._step}")
            files = self._hosts.save(directory)
            if not self._whole():
                raise Interrupted("a host that holds experts is lost; it has written nothing")
            self._go_on(attempt)
        return files

    def bias(self) -> Tensor:
        """[L, E] float32, the gates' bias of the current step."""
        with self._changed:
            return self._bias.clone()

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """Committed steps after `since_step`, oldest first, as far back as they are kept."""
        with self._changed:
            return [one for one in self._metrics if one.step > since_step]

    def close(self) -> None:
        """Wake every waiter with an error and end the threads."""
        self.fail("the coordinator has been closed")
        self._hosts.close()

    # --- a step

    def _decided(self, report: StepReport, attempt: int) -> StepDecision:
        """The decision of a step, made by whoever reports last; with the lock held."""
        self._changed.wait_for(
            lambda: self._step > report.step or self._failure is not None or self._attempt != attempt
        )
        self._raise_failure()
        self._raise_interrupted(attempt)
        if self._decision is None or self._decision.step != report.step:
            raise ProtocolError(
                f"worker {report.worker} waits for step {report.step}, but the run is at {self._step}"
            )
        return self._decision

    def _decide(self, reports: Sequence[StepReport], attempt: int) -> StepDecision:
        """With `_deciding` held, so no recovery changes the hosts meanwhile."""
        step = reports[0].step
        self._go_on(attempt)
        squared = self._hosts.prepare(step)
        if not self._whole():  # the gradients of a host that is lost are missing
            raise Interrupted("an expert host was lost in the middle of the step")
        decision = decide(
            self._plan,
            reports,
            self._bias,
            experts_squared=squared,
            epoch=self._hosts.epoch,
            stop=self._stop,
            keeps=self._elastic is not None and self._plan.keeps(step + 1) and self._hosts.copied(),
        )
        self._go_on(attempt)
        self._hosts.commit(decision, lambda text, error: self._failed(text, error, attempt))
        decision = self._reshaped(decision)
        if decision.snapshot:
            self._hosts.snapshot(step + 1, decision.bias)
        with self._changed:
            self._raise_failure()
            self._raise_interrupted(attempt)
            self._decision, self._bias, self._step = decision, decision.bias, step + 1
            self._vain = 0
            self._reports.clear()
            self._metrics.append(merge(reports, decision))
            self._changed.notify_all()
        return decision

    def _reshaped(self, decision: StepDecision) -> StepDecision:
        """Let experts move between two steps, when they are to; what hosts that go have kept is kept anew."""
        why = None if self._elastic is None else self._elastic.due()
        if why is None:
            return decision
        try:
            seconds = self._hosts.reshape(why, decision.step + 1)
        except RaymoeError:  # as it was, and noted; the next boundary tries again
            return decision
        self.pauses.append((why, seconds))
        with self._changed:
            if not self._whole():  # it was lost before it was placed, which no loss has told of
                self._interrupt("a host was lost while experts moved")
        return replace(decision, epoch=self._hosts.epoch, snapshot=self._plan.snapshot_interval > 0)

    def _keep(self, step: int, bias: Tensor) -> None:
        if self._elastic is not None and self._plan.snapshot_interval > 0:
            with suppress(RaymoeError):
                self._hosts.snapshot(step, bias)

    # --- recovery

    def _failed(self, text: str, error: BaseException, attempt: int) -> None:
        """A host has failed in an attempt: its loss interrupts the run, an error of its own ends it."""
        with self._changed:
            if attempt != self._attempt:
                return
            if is_loss(error):
                self._interrupt(text)
            else:
                self.fail(text)

    def _interrupt(self, why: str) -> None:
        """With the lock held. While the run is being brought back, that takes account of further losses."""
        if self._interrupted is not None or self._failure is not None:
            return
        self._interrupted = why
        self._attempt += 1
        self._joined.clear()
        self._reports.clear()
        self._vain += 1
        self._changed.notify_all()
        if self._vain > _VAIN:
            self._failure = f"interrupted {self._vain} times without a step in between, at last: {why}"
            return
        threading.Thread(target=self._recover, args=(why,), name="recovery", daemon=True).start()

    def _recover(self, why: str) -> None:
        """One at a time: until it is done the run counts as interrupted."""
        began = time.monotonic()
        try:
            with self._deciding:  # whoever decides fails soon, or has decided
                self._hosts.settle()
                while not self._take(self._recovery.run(), f"back, since {why}", began):
                    continue
        except Exception as error:
            self.fail(f"{why}; and the run cannot go on from memory or a checkpoint: {error}")

    def _take(self, restored: Restored, why: str, began: float) -> bool:
        """Go on from there, unless a host has been lost again; with `_deciding` held."""
        with self._changed:
            if self._failure is not None:
                return True
            if not self._whole():
                return False
            self._step, self._bias, self._decision = restored.step, restored.bias, None
            self._trunk, self._directory = restored.trunk, restored.directory
            self._reports.clear()
            while self._metrics and self._metrics[-1].step >= restored.step:
                self._metrics.pop()
            self._interrupted = None
            self.pauses.append((f"{why}, at step {restored.step}", time.monotonic() - began))
            self._changed.notify_all()
        self._keep(restored.step, restored.bias)
        return True

    def _whole(self) -> bool:
        """Whether all hosts are there that hold experts, and with them the gradients of the step."""
        return self._elastic is None or self._elastic.versions.intact

    def _go_on(self, attempt: int) -> None:
        with self._changed:
            self._raise_failure()
            self._raise_interrupted(attempt)

    def _check(self, report: StepReport) -> None:
        if not 0 <= report.worker < self._workers:
            raise ProtocolError(f"worker {report.worker} is unknown: the run has {self._workers} workers")
        if tuple(report.loads.shape) != self._shape or report.loads.dtype != torch.int64:
            raise ProtocolError(
                f"worker {report.worker} reports loads {list(report.loads.shape)} of {report.loads.dtype}, "
                f"not {list(self._shape)} of int64"
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RaymoeError(self._failure)

    def _raise_interrupted(self, attempt: int) -> None:
        if self._interrupted is not None or self._attempt != attempt:
            raise Interrupted(f"the step is given up: {self._interrupted or 'it is being done again'}")


__all__ = ["Beginning", "TrainingSteps"]
