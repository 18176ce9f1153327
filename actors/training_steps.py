"""The steps of a training run: reports in, one decision out, committed on all hosts; and back after a loss.

A step ends in two phases. When every worker has reported, the hosts `prepare`: they seal their gradients
and say how large they are. From that follow one clip factor, learning rate and bias: the decision. Then the
hosts `commit` while the workers, who have the decision, already apply their own optimizer; the next step
is not decided before every host has committed this one.

When a host, a worker or a coordinator is lost, the run is interrupted: whoever waits hears it, gives up what
it is at and joins again; meanwhile all experts are brought back to the newest step that is kept in memory, or
to a checkpoint, under a new epoch, which no late request of the old one can reach. An attempt is what lies
between two interruptions.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from actors.common_snapshot import DECISIONS, CommonSnapshot, buddies, newest_common
from actors.elastic import Elastic, nothing
from actors.moves import Blob
from actors.published import Placed
from actors.steps import HostControl, Resume, StepDecision, StepMetrics, StepReport, TrainingPlan
from cluster.placement import plan as plan_placement
from cluster.topology import HostInfo, RoutingTable
from errors import ChannelError, CheckpointError, Interrupted, ProtocolError, RaymoeError, is_loss
from model.balance import max_violation, update_bias
from model.schedule import learning_rate, value_at

_T = TypeVar("_T")
_HISTORY = 1024  # steps of metrics that are kept
_VAIN = 5  # interruptions without a step in between, after which it is no accident
_HOST_SECONDS = 600.0  # to wait for a host when there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Where a run can be begun again when memory is lost.

    Attributes:
        directory: of a checkpoint; empty for what the run itself began with.
        step: optimizer steps behind it.
        moments: whether the optimizer's state is there too.
        bias: [L, E] float32.
    """

    directory: str
    step: int
    moments: bool
    bias: Tensor


class TrainingSteps:
    """One per training run. All methods may be called from several threads at once.

    Args:
        plan: schedules and sizes.
        shape: (L, E).
        hosts: the expert hosts; None with experts in the workers' processes.
        beginning: says where the run can be begun again, the latest first known.
        step: the first step.
        bias: [L, E] float32.
        recovering: the hosts have been running under a coordinator that is gone.
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
        recovering: bool = False,
    ) -> None:
        self._plan, self._shape, self._elastic = plan, shape, hosts
        self._beginning = beginning
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
        self._commits: list[tuple[HostInfo, Future[None]]] = []
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="steps")
        self._metrics: deque[StepMetrics] = deque(maxlen=_HISTORY)
        self.pauses: deque[tuple[str, float]] = deque(maxlen=_HISTORY)
        if recovering:
            self.interrupt("the coordinator was started anew")

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
            if self._attempt == attempt or (attempt < 0 and rank in self._joined):
                self._interrupt(why)
            self._joined.add(rank)
            self._workers = workers
            ready = self._changed.wait_for(
                lambda: self._interrupted is None or self._failure is not None, timeout
            )
            self._raise_failure()
            if not ready:
                raise Interrupted("the run is being brought back to a common step; join again")
            return Resume(
                attempt=self._attempt, step=self._step, trunk=self._trunk, directory=self._directory
            )

    def interrupt(self, why: str) -> None:
        """Something that the step needs is lost: all begin again, at a step that is known everywhere."""
        with self._changed:
            if self._interrupted is None and self._failure is None:
                self._interrupt(why)

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
            reports = [self._reports[worker] for worker in sorted(self._reports)]
        try:
            with self._deciding:
                return self._decide(reports, attempt)
        except Interrupted:
            raise
        except RaymoeError as error:
            if is_loss(error):
                self.interrupt(str(error))
                raise Interrupted(str(error)) from error
            self.fail(str(error))
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
            ProtocolError: the run is at another step.
            RaymoeError: a host failed to commit or to write.
        """
        with self._changed:
            self._raise_failure()
            self._raise_interrupted(self._attempt)
            if step != self._step:
                raise ProtocolError(
                    f"a checkpoint after {step} steps was asked for, the run is at {self._step}"
                )
            commits = self._commits
        self._finish(commits)
        return [name for names in self._on_hosts("save", lambda host: host.save(directory)) for name in names]

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
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- a step

    def _decide(self, reports: Sequence[StepReport], attempt: int) -> StepDecision:
        step, first, plan = reports[0].step, reports[0], self._plan
        self._finish(self._commits)
        squared = first.trunk_squared_norm + first.local_expert_squared_norm
        squared += sum(self._on_hosts("prepare", lambda host: host.prepare(step)))
        norm = math.sqrt(squared) if squared >= 0 else math.nan
        if not math.isfinite(norm):
            raise RaymoeError(
                f"the gradient of step {step} is not finite (norm {norm}): lower training.learning_rate, "
                "or go on from an earlier checkpoint"
            )
        load = torch.stack([report.loads for report in reports]).sum(0)
        rate = value_at(plan.update_rate, step) if plan.strategy == "bias" else 0.0
        bias = update_bias(self._bias, load, rate, center=plan.center_update) if rate else self._bias
        kept = self._elastic is not None and plan.snapshot_interval > 0
        last = self._stop or step + 1 >= plan.steps
        due = plan.checkpoint_interval > 0 and (step + 1) % plan.checkpoint_interval == 0
        decision = StepDecision(
            step=step,
            learning_rate=learning_rate(
                step,
                peak=plan.learning_rate,
                warmup_steps=plan.warmup_steps,
                total_steps=plan.steps,
                min_ratio=plan.min_learning_rate_ratio,
            ),
            # As torch.nn.utils.clip_grad_norm_ has it.
            scale=min(1.0, plan.clip_norm / (norm + 1e-6)) if plan.clip_norm > 0 else 1.0,
            grad_norm=norm,
            bias=bias,
            epoch=self._epoch(),
            checkpoint=due or last,
            stop=last,
            snapshot=kept and (step + 1) % plan.snapshot_interval == 0,
        )
        commits = [(info, self._pool.submit(self._commit, host, decision)) for info, host in self._members()]
        decision = self._reshaped(decision, commits)
        with self._changed:
            self._raise_failure()
            self._raise_interrupted(attempt)
            self._commits = commits
            if decision.snapshot:
                self._snapshot(decision.step + 1, bias)
            self._decision, self._bias, self._step = decision, bias, step + 1
            self._vain = 0
            self._reports.clear()
            self._metrics.append(_merge(reports, load, decision))
            self._changed.notify_all()
        return decision

    def _commit(self, host: HostControl, decision: StepDecision) -> None:
        try:
            host.commit(decision.step, decision.learning_rate, decision.scale)
        except Exception as error:
            # Its peers have moved on without it.
            if is_loss(error):
                self.interrupt(str(error))
            else:
                self.fail(f"an expert host did not commit step {decision.step}: {error}")
            raise

    def _reshaped(
        self, decision: StepDecision, commits: Sequence[tuple[HostInfo, Future[None]]]
    ) -> StepDecision:
        """Let experts move between two steps, when they are to."""
        why = None if self._elastic is None else self._elastic.due()
        if self._elastic is None or why is None:
            return decision
        self._finish(commits)
        try:
            seconds = self._elastic.reshape(why, step=decision.step + 1)
        except RaymoeError:  # as it was, and noted; the next boundary tries again
            return decision
        self.pauses.append((why, seconds))
        return replace(decision, epoch=self._epoch())

    def _snapshot(self, step: int, bias: Tensor) -> None:
        """Let hosts keep their state once they have committed; nobody waits for it but the next commit."""
        assert self._elastic is not None
        members = self._elastic.hosts()
        keepers = buddies([(id, info.node) for id, (info, _) in members.items()])
        blob = Blob(name=DECISIONS, step=step, tensors={"bias": bias})

        def keep(commit: Future[None] | None, id: str, host: HostControl) -> None:
            if commit is not None:
                commit.result()
            keeper = keepers.get(id)
            host.snapshot(step, [members[keeper][0]] if keeper is not None else [])
            host.put(blob)

        before = {info.id: commit for info, commit in self._commits}
        for id, (info, host) in members.items():
            self._commits.append((info, self._pool.submit(self._kept, keep, before.get(id), id, host)))

    def _kept(
        self,
        keep: Callable[[Future[None] | None, str, HostControl], None],
        commit: Future[None] | None,
        id: str,
        host: HostControl,
    ) -> None:
        with suppress(RaymoeError):  # without a copy there is one step less to go back to
            keep(commit, id, host)

    # --- recovery

    def _interrupt(self, why: str) -> None:
        """With the lock held."""
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
        began = time.monotonic()
        try:
            with self._deciding:  # whoever decides fails soon, or has decided
                commits, self._commits = self._commits, []
                for _, commit in commits:
                    with suppress(Exception):
                        commit.exception(timeout=0)
                step, bias = self._restored()
                with self._changed:
                    self._step, self._bias, self._decision = step, bias, None
                    self._reports.clear()
                    while self._metrics and self._metrics[-1].step >= step:
                        self._metrics.pop()
                    self._interrupted = None
                    self.pauses.append((f"back to step {step}, since {why}", time.monotonic() - began))
                    self._changed.notify_all()
        except Exception as error:
            self.fail(f"{why}; and the run cannot go on from memory or a checkpoint: {error}")

    def _restored(self) -> tuple[int, Tensor]:
        """Bring the hosts to a common step: the step, and the gates' bias at it."""
        if self._elastic is None:
            beginning = self._begin()
            self._trunk, self._directory = (), beginning.directory
            return beginning.step, beginning.bias
        errors: list[str] = []
        for _ in range(_VAIN):
            try:
                return self._restored_from(self._elastic)
            except RaymoeError as error:
                if not is_loss(error):
                    raise
                errors.append(str(error))
        raise RaymoeError(errors[-1])

    def _restored_from(self, elastic: Elastic) -> tuple[int, Tensor]:
        elastic.bury_the_dead("the run was interrupted")
        sites = elastic.await_sites(_HOST_SECONDS)
        members = elastic.hosts()
        infos = {id: info for id, (info, _) in members.items()}
        inventories = {id: host.inventory() for id, (_, host) in members.items()}
        epochs = [epoch for _, host in members.values() for epoch in host.stats().epochs]
        found = newest_common(inventories, layers=elastic.shape.layers, n_experts=elastic.shape.n_experts)
        beginning = self._begin()
        if found is not None and found.step < beginning.step:
            found = None
        placement = plan_placement(
            sites,
            n_layers=len(elastic.shape.layers),
            n_experts=elastic.shape.n_experts,
            n_group=elastic.shape.n_group,
            held=elastic.held(),
        )
        version = Placed(
            name="",
            epoch=elastic.versions.next_epoch(above=max(epochs, default=-1)),
            directory=None if found is not None else beginning.directory,
            placement=placement,
        )
        if found is None:
            elastic.install(version, nothing(placement), step=beginning.step, moments=beginning.moments)
            self._trunk, self._directory = (), beginning.directory
            return beginning.step, beginning.bias
        elastic.install(version, found.sources, step=found.step)
        self._trunk, self._directory = tuple(infos[id] for id in found.trunk), None
        return found.step, _bias_of(found, members)

    def _begin(self) -> Beginning:
        if self._beginning is None:
            raise RaymoeError("no checkpoint to begin again from")
        return self._beginning()

    # --- hosts

    def _epoch(self) -> int:
        current = None if self._elastic is None else self._elastic.versions.current
        return 0 if current is None else current.epoch

    def _finish(self, commits: Sequence[tuple[HostInfo, Future[None]]]) -> None:
        """Wait until every host has committed the step before."""
        for info, commit in commits:
            error = commit.exception()
            if error is not None:
                kind = ChannelError if is_loss(error) else RaymoeError
                raise kind(f"expert host {info.id} did not commit the last step: {error}") from error

    def _on_hosts(self, what: str, call: Callable[[HostControl], _T]) -> list[_T]:
        """Call every host at once; the results in the order of the hosts."""
        calls = [(info, self._pool.submit(call, host)) for info, host in self._members()]
        results, errors = [], []
        for info, pending in calls:
            try:
                results.append(pending.result())
            except Exception as error:
                errors.append((info, error))
        if errors:
            text = "; ".join(f"expert host {info.id} failed to {what}: {error}" for info, error in errors)
            kind = ChannelError if any(is_loss(e) for _, e in errors) else RaymoeError
            raise kind(text) from errors[0][1]
        return results

    def _members(self) -> list[tuple[HostInfo, HostControl]]:
        """The hosts that hold experts."""
        if self._elastic is None or self._elastic.versions.current is None:
            return []
        hosts = self._elastic.hosts()
        return [hosts[id] for id in self._elastic.versions.current.placement.sites if id in hosts]

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


def _bias_of(found: CommonSnapshot, members: dict[str, tuple[HostInfo, HostControl]]) -> Tensor:
    """The gates' bias at a common step."""
    error: RaymoeError | None = None
    for id in found.decisions:
        try:
            return members[id][1].get(DECISIONS, found.step).tensors["bias"].clone()
        except RaymoeError as failed:
            error = failed
    raise ChannelError(f"no host gives the decisions of step {found.step} back: {error}")


def _merge(reports: Sequence[StepReport], load: Tensor, decision: StepDecision) -> StepMetrics:
    """The workers' sums as one step's metrics."""
    targets = max(1, sum(report.n_targets for report in reports))
    rows = max(1, sum(report.n_rows for report in reports))
    routed = max(1, sum(report.tokens_routed for report in reports))
    return StepMetrics(
        step=decision.step,
        loss=sum(report.main_sum for report in reports) / targets,
        mtp_loss=sum(report.mtp_sum for report in reports) / targets,
        balance_loss=sum(report.balance_sum for report in reports) / rows,
        learning_rate=decision.learning_rate,
        grad_norm=decision.grad_norm,
        scale=decision.scale,
        max_violation=tuple(max_violation(load).tolist()),
        tokens=sum(report.tokens for report in reports),
        seconds=max(report.seconds for report in reports),
        hosts_per_token=sum(report.rows_sent for report in reports) / routed,
        bytes=sum(report.bytes for report in reports),
    )


__all__ = ["Beginning", "TrainingSteps"]
