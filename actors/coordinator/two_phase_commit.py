"""The end of a training step: one decision from all workers' reports, committed on all expert hosts.

A step ends in two phases. First the hosts `prepare`: they seal their gradients and return the sum of their
squares. From these and the workers' reports follow one clip factor, learning rate and gates' bias: the
decision. Then the hosts `commit` it while the workers, which receive it at once, apply their own optimizer.
The next step is not decided before every host has committed this one.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from actors.coordinator.host_calls import HostCalls, results
from actors.coordinator.host_snapshots import HostSnapshots
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.run_state import RunState, StepReports
from actors.messages.host_control import HostControl
from actors.messages.steps import StepDecision, StepMetrics, StepReport, TrainingPlan
from errors import Interrupted, ProtocolError, RaymoeError
from model.balance import max_violation, update_bias
from model.optimizers.schedule import learning_rate, value_at

_T = TypeVar("_T")
_AT_ONCE = 64  # hosts that are called at the same time


class TwoPhaseCommit:
    """Commits training steps on the expert hosts; callers hold `lock`.

    Args:
        plan: Schedules and sizes.
        state: State of the run.
        placements: The hosts and what they hold; None with experts in the workers' processes.

    Attributes:
        lock: Held while the hosts are commanded, by a commit, a checkpoint or a recovery, until its end.
        stop_requested: Whether the next step is to be the last.
    """

    def __init__(self, plan: TrainingPlan, state: RunState, placements: PlacementController | None) -> None:
        self.lock = threading.Lock()
        self.stop_requested = False
        self._plan, self._state, self._placements = plan, state, placements
        self._calls = HostCalls("steps", _AT_ONCE)
        self._snapshots = HostSnapshots(placements, plan.snapshot_interval, self._calls)
        self._commits: list[tuple[str, Future[None]]] = []  # of the step before, and its snapshot

    @property
    def epoch(self) -> int:
        """Epoch of the experts in use."""
        current = None if self._placements is None else self._placements.published.current
        return 0 if current is None else current.epoch

    @property
    def intact(self) -> bool:
        """Whether no host was lost that held experts, and with them gradients of the step."""
        return self._placements is None or self._placements.published.intact

    def commit(self, step: StepReports) -> StepDecision:
        """End a step: prepare, decide, commit; then move experts and take a snapshot where due.

        Raises:
            Interrupted: The attempt is over, or a host was lost.
            RaymoeError: A host failed, or the gradient is not finite.
        """
        state, attempt, number = self._state, step.attempt, step.reports[0].step
        state.require_running(attempt)
        squared = self._prepare(number)
        if not self.intact:
            raise Interrupted("an expert host was lost in the middle of the step")
        decision = decide(
            self._plan,
            step.reports,
            state.bias,
            experts_squared=squared,
            epoch=self.epoch,
            stop=self.stop_requested,
            snapshot=self._snapshots.due(number + 1),
        )
        state.require_running(attempt)
        self._commit_on_hosts(decision, attempt)
        decision = self._move_experts_if_due(decision)
        if decision.snapshot:
            self.take_snapshot(number + 1, decision.bias)
        state.commit_step(decision, merge(step.reports, decision), attempt)
        return decision

    def take_snapshot(self, step: int, bias: Tensor) -> None:
        """Have the hosts keep their state in memory, if snapshots are taken, without waiting for it.

        Args:
            step: Optimizer steps behind the state.
            bias: `[L, E]` float32, the gates' bias at this step.
        """
        if self._snapshots.enabled:
            commits = dict(self._commits)
            self._commits += self._snapshots.take(step, bias, epoch=self.epoch, commits=commits)

    def save(self, directory: str) -> list[str]:
        """Have all hosts write their part of a checkpoint; returns the files' names.

        Raises:
            Interrupted: A host that holds experts was lost; its part is missing.
            RaymoeError: A host failed to commit or to write.
        """
        self.finish()
        epoch = self.epoch
        found = self._on_all("save", lambda host: host.save(directory, epoch))
        if not self.intact:
            raise Interrupted("a host that holds experts is lost; it has written nothing")
        return [name for names in found for name in names]

    def finish(self) -> None:
        """Wait until every host has committed the step before.

        Raises:
            RaymoeError: A host failed to commit the step before.
        """
        results("commit the last step", self._commits)

    def drain(self) -> None:
        """Wait for all commits and snapshots under way, whether they succeed or not, and forget them."""
        commits, self._commits = self._commits, []
        for _, commit in commits:
            with suppress(Exception):
                commit.result()

    def close(self) -> None:
        """End the threads."""
        self._calls.close()

    def _prepare(self, step: int) -> float:
        """Have all hosts seal their gradients; returns the sum of the gradients' squares.

        Raises:
            RaymoeError: A host did not commit the step before, or did not prepare this one.
        """
        self.finish()
        epoch = self.epoch
        if self._placements is not None and self._placements.spec.replicated:
            # Every holder of an expert seals its gradients before any of them sums those of the others.
            self._on_all("seal its gradients", lambda host: _in_epoch(epoch, host, host.seal, step))
            return sum(self._on_all("prepare", lambda host: host.prepare(step, epoch)))
        return sum(self._on_all("prepare", lambda host: _in_epoch(epoch, host, host.prepare, step)))

    def _commit_on_hosts(self, decision: StepDecision, attempt: int) -> None:
        """Have all hosts apply the step, in the background; a failure interrupts or ends the run."""
        epoch = self.epoch

        def commit(id: str, host: HostControl) -> None:
            try:
                host.commit(decision.step, decision.learning_rate, decision.scale, epoch)
            except Exception as error:
                text = f"expert host {id} did not commit step {decision.step}: {error}"
                self._state.host_failed(text, error, attempt)
                raise

        self._commits = [(id, self._calls.submit(commit, id, host)) for id, host in self._holders()]

    def _move_experts_if_due(self, decision: StepDecision) -> StepDecision:
        """Move experts between two steps when that is due; a snapshot of the new placement follows."""
        why = None if self._placements is None else self._placements.due()
        if self._placements is None or why is None:
            return decision
        try:
            self.finish()
            seconds = self._placements.reshape(why, step=decision.step + 1)
        except RaymoeError:  # recorded as an event; nothing has changed, and the next step tries again
            return decision
        self._state.pauses.append((why, seconds))
        if not self.intact:  # a host was lost before it was placed on, of which no listener is told
            self._state.interrupt("a host was lost while experts moved")
        return replace(decision, epoch=self.epoch, snapshot=self._snapshots.enabled)

    def _on_all(self, what: str, call: Callable[[HostControl], _T]) -> list[_T]:
        """Call every host that holds experts at the same time; the results in the order of the hosts."""
        hosts = dict(self._holders())
        return self._calls.on_all(hosts, what, lambda id: call(hosts[id]))

    def _holders(self) -> list[tuple[str, HostControl]]:
        """(id, client) of the hosts that hold experts."""
        current = None if self._placements is None else self._placements.published.current
        if self._placements is None or current is None:
            return []
        hosts = self._placements.roster.hosts()
        return [(id, hosts[id][1]) for id in current.placement.sites if id in hosts]


def _in_epoch(epoch: int, host: HostControl, call: Callable[[int, int | None], _T], step: int) -> _T:
    """Call a host for an epoch; after a ProtocolError, send `retain` and retry the call once."""
    try:
        return call(step, epoch)
    except ProtocolError:
        host.retain(epoch)  # the first `retain` may have been lost; fails if the host does not hold the epoch
        return call(step, epoch)


def decide(
    plan: TrainingPlan,
    reports: Sequence[StepReport],
    bias: Tensor,
    *,
    experts_squared: float,
    epoch: int,
    stop: bool,
    snapshot: bool,
) -> StepDecision:
    """One clip factor, learning rate and bias for all workers and hosts. Pure.

    Args:
        plan: Schedules and sizes.
        reports: Reports of all workers, worker 0's first.
        bias: `[L, E]` float32, the bias that the step was computed with.
        experts_squared: Sum over the hosts of their gradients' squares.
        epoch: Placement epoch of the next step.
        stop: Whether the run stops after this step.
        snapshot: Whether the state after this step is kept in memory.

    Raises:
        RaymoeError: The gradient is not finite.
    """
    first = reports[0]
    step = first.step
    squared = first.trunk_squared_norm + first.local_expert_squared_norm + experts_squared
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    if not math.isfinite(norm):
        raise RaymoeError(
            f"the gradient of step {step} is not finite (norm {norm}): lower training.learning_rate, "
            "or go on from an earlier checkpoint"
        )
    rate = value_at(plan.update_rate, step) if plan.strategy == "bias" else 0.0
    load = total_load(reports)
    last = stop or step + 1 >= plan.steps
    due = plan.checkpoint_interval > 0 and (step + 1) % plan.checkpoint_interval == 0
    return StepDecision(
        step=step,
        learning_rate=learning_rate(
            step,
            peak=plan.learning_rate,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.steps,
            min_ratio=plan.min_learning_rate_ratio,
        ),
        # The same factor as torch.nn.utils.clip_grad_norm_.
        scale=min(1.0, plan.clip_norm / (norm + 1e-6)) if plan.clip_norm > 0 else 1.0,
        grad_norm=norm,
        bias=update_bias(bias, load, rate, center=plan.center_update) if rate else bias,
        epoch=epoch,
        checkpoint=due or last,
        stop=last,
        snapshot=snapshot,
    )


def total_load(reports: Sequence[StepReport]) -> Tensor:
    """`[L, E]` int64 loads, summed over the workers."""
    return torch.stack([report.loads for report in reports]).sum(0)


def merge(reports: Sequence[StepReport], decision: StepDecision) -> StepMetrics:
    """Metrics of a step, from the workers' sums."""
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
        max_violation=tuple(max_violation(total_load(reports)).tolist()),
        tokens=sum(report.tokens for report in reports),
        seconds=max(report.seconds for report in reports),
        hosts_per_token=sum(report.rows_sent for report in reports) / routed,
        bytes=sum(report.bytes for report in reports),
    )


__all__ = ["TwoPhaseCommit", "decide", "merge", "total_load"]
