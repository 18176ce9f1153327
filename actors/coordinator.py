"""The coordinator: control plane of a training run. No rows, weights or gradients pass through it.

A step ends in two phases. When every worker has reported, the hosts `prepare`: they seal their gradients
and say how large they are. From that follow one clip factor, learning rate and bias: the decision. Then the
hosts `commit` while the workers, who have the decision, already apply their own optimizer; the next step
is not decided before every host has committed this one.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from actors.steps import HostControl, HostStats, StepDecision, StepMetrics, StepReport, TrainingPlan
from cluster.topology import Holders, HostInfo, RoutingTable
from errors import CheckpointError, ProtocolError, RaymoeError
from model.balance import max_violation, update_bias
from model.schedule import learning_rate, value_at

_HISTORY = 1024  # steps of metrics that are kept
_T = TypeVar("_T")


class Coordinator:
    """One per training run. All methods may be called from several threads at once.

    Args:
        plan: schedules and sizes.
        holders: of every expert (`cluster.placement.plan_placement`); no hosts, no rows: in process.
        n_layers: L.
        n_experts: E.
        n_hosts: expert hosts that will register; 0 with experts in the workers' processes.
        control: HostInfo -> how to command that host.
        state: from `state()` of an earlier run; None starts at step 0.
        bias: `[L, E]` float32 of that run; None for zeros.
        epoch: placement epoch.
        weights: version of the weights that the hosts start with.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        *,
        holders: Holders,
        n_layers: int,
        n_experts: int,
        n_hosts: int,
        control: Callable[[HostInfo], HostControl],
        state: dict[str, Any] | None = None,
        bias: Tensor | None = None,
        epoch: int = 0,
        weights: str = "",
    ) -> None:
        self._plan = plan
        self._holders = holders
        self._shape = (n_layers, n_experts)
        self._n_hosts = n_hosts
        self._control = control
        self._epoch = epoch
        self._weights = weights
        self._loaded: tuple[int, str] | None = None  # epoch and version, not published yet
        self._last_epoch = epoch
        self._hosts: dict[str, tuple[HostInfo, HostControl]] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._stop = False
        self._step = 0 if state is None else int(state["step"])
        self._bias = torch.zeros(n_layers, n_experts) if bias is None else bias.clone()
        if self._bias.shape != self._shape or self._bias.dtype != torch.float32:
            raise CheckpointError(
                f"the gates' bias is {list(self._bias.shape)} of {self._bias.dtype}, "
                f"the model needs {list(self._shape)} of float32"
            )
        self._reports: dict[int, StepReport] = {}
        self._decision: StepDecision | None = None
        self._commits: list[tuple[HostInfo, Future[None]]] = []
        self._pool = ThreadPoolExecutor(max(1, 2 * n_hosts), thread_name_prefix="coordinator")
        self._metrics: deque[StepMetrics] = deque(maxlen=_HISTORY)

    @property
    def step(self) -> int:
        """The step whose reports are awaited."""
        return self._step

    @property
    def workers(self) -> int:
        """Workers that report each step."""
        return self._plan.workers

    @property
    def epoch(self) -> int:
        """Version of the placement."""
        return self._epoch

    @property
    def failure(self) -> str | None:
        """What ended the run; None while it goes on."""
        return self._failure

    def register_host(self, info: HostInfo) -> None:
        """Take in a host; the order of the hosts' ids is the order of the placement. A repeat is fine.

        Raises:
            ProtocolError: more hosts than the placement has.
        """
        with self._changed:
            if info.id not in self._hosts and len(self._hosts) == self._n_hosts:
                raise ProtocolError(
                    f"expert host {info.id} is one too many: the placement is for {self._n_hosts} hosts"
                )
            self._hosts[info.id] = (info, self._control(info))
            self._changed.notify_all()

    def table(self, timeout: float | None = 0.0) -> RoutingTable:
        """The routing table, once all hosts have registered.

        Args:
            timeout: seconds to wait for them; None waits for ever.

        Raises:
            ProtocolError: hosts are missing.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._hosts) == self._n_hosts or self._failure, timeout)
            self._raise_failure()
            if len(self._hosts) != self._n_hosts:
                raise ProtocolError(
                    f"{len(self._hosts)} of {self._n_hosts} expert hosts have registered "
                    f"({sorted(self._hosts)}): wait for the others to start, or look for their errors"
                )
            hosts = tuple(self._hosts[id][0] for id in self._order())
            return RoutingTable(epoch=self._epoch, hosts=hosts, holders=self._holders, weights=self._weights)

    def load(self, directory: str, version: str) -> int:
        """Let all hosts load other weights beside those in use; the epoch of requests to them.

        When one host cannot, all of them drop what they have loaded.

        Raises:
            RaymoeError: what a host failed with.
        """
        with self._changed:
            self._raise_failure()
            self._last_epoch += 1
            epoch = self._last_epoch
        try:
            self._on_hosts("load the weights", lambda host: host.load(epoch, directory))
        except RaymoeError:
            with suppress(RaymoeError):  # the hosts that are there do, whatever has become of the others
                self.retire()
            raise
        with self._changed:
            self._loaded = (epoch, version)
        return epoch

    def publish(self, epoch: int) -> None:
        """Make loaded weights those of the routing table; hosts answer requests of the old epoch too.

        Raises:
            ProtocolError: they are not the last ones loaded.
        """
        with self._changed:
            if epoch == self._epoch:
                return
            if self._loaded is None or self._loaded[0] != epoch:
                raise ProtocolError(f"no weights have been loaded for epoch {epoch}: load them first")
            (self._epoch, self._weights), self._loaded = self._loaded, None

    def retire(self) -> None:
        """Let all hosts drop the weights of every epoch but the routing table's.

        Raises:
            RaymoeError: a host cannot be reached; the others have dropped theirs.
        """
        with self._changed:
            epoch, self._loaded = self._epoch, None
        self._on_hosts("drop weights", lambda host: host.retain(epoch))

    def report(self, report: StepReport) -> StepDecision:
        """End a step: blocks until every worker has reported it, then gives each the same decision.

        A repeat of a report, while the step is open or after it, has no effect and gets that decision.

        Raises:
            ProtocolError: another step than the current one or the last, an unknown worker, or loads of
                another shape.
            RaymoeError: a host or another worker failed, or the gradient is not finite.
        """
        self._check(report)
        with self._changed:
            self._raise_failure()
            last = self._decision
            if last is not None and report.step == last.step:
                return last
            if report.step != self._step:
                raise ProtocolError(
                    f"worker {report.worker} reports step {report.step}, but the run is at step {self._step}"
                )
            mine = report.worker not in self._reports
            self._reports[report.worker] = report
            if not mine or len(self._reports) < self._plan.workers:
                self._changed.wait_for(lambda: self._step > report.step or self._failure is not None)
                self._raise_failure()
                if self._decision is None or self._decision.step != report.step:
                    raise ProtocolError(
                        f"worker {report.worker} waits for step {report.step}, but the run is at {self._step}"
                    )
                return self._decision
            reports = [self._reports[worker] for worker in sorted(self._reports)]
        try:
            return self._decide(reports)
        except RaymoeError as error:
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
            if step != self._step:
                raise ProtocolError(
                    f"a checkpoint after {step} steps was asked for, the run is at {self._step}"
                )
            commits = self._commits
        self._finish(commits)
        return [name for names in self._on_hosts("save", lambda host: host.save(directory)) for name in names]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the bias: a dictionary that JSON keeps without loss."""
        with self._changed:
            return {"step": self._step, "epoch": self._epoch}

    def bias(self) -> Tensor:
        """[L, E] float32, the gates' bias of the current step."""
        with self._changed:
            return self._bias.clone()

    def metrics(self, since_step: int = -1) -> list[StepMetrics]:
        """Committed steps after `since_step`, oldest first, as far back as they are kept."""
        with self._changed:
            return [one for one in self._metrics if one.step > since_step]

    def host_stats(self) -> list[HostStats]:
        """Every host's counters, in the order of the placement."""
        return self._on_hosts("stats", lambda host: host.stats())

    def close(self) -> None:
        """Wake every waiter with an error and end the threads."""
        self.fail("the coordinator has been closed")
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decide(self, reports: Sequence[StepReport]) -> StepDecision:
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
        with self._changed:
            self._raise_failure()
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
                epoch=self._epoch,
                checkpoint=due or last,
                stop=last,
            )
            self._commits = [
                (info, self._pool.submit(self._commit, info, host, decision))
                for info, host in self._members()
            ]
            self._decision, self._bias, self._step = decision, bias, step + 1
            self._reports.clear()
            self._metrics.append(_merge(reports, load, decision))
            self._changed.notify_all()
        return decision

    def _commit(self, info: HostInfo, host: HostControl, decision: StepDecision) -> None:
        """Commit on one host. One that does not ends the run at once: its peers have moved on without it."""
        try:
            host.commit(decision.step, decision.learning_rate, decision.scale)
        except Exception as error:
            self.fail(f"expert host {info.id} did not commit step {decision.step}: {error}")
            raise

    def _finish(self, commits: Sequence[tuple[HostInfo, Future[None]]]) -> None:
        """Wait until every host has committed the step before."""
        for info, commit in commits:
            error = commit.exception()
            if error is not None:
                raise RaymoeError(f"expert host {info.id} did not commit the last step: {error}") from error

    def _on_hosts(self, what: str, call: Callable[[HostControl], _T]) -> list[_T]:
        """Call every host at once; the results in the order of the placement."""
        with self._changed:
            members = self._members()
        calls = [(info, self._pool.submit(call, host)) for info, host in members]
        results, errors = [], []
        for info, pending in calls:
            try:
                results.append(pending.result())
            except Exception as error:
                errors.append((info, error))
        if errors:
            text = "; ".join(f"expert host {info.id} failed to {what}: {error}" for info, error in errors)
            raise RaymoeError(text) from errors[0][1]
        return results

    def _members(self) -> list[tuple[HostInfo, HostControl]]:
        if len(self._hosts) != self._n_hosts:
            raise ProtocolError(f"{len(self._hosts)} of {self._n_hosts} expert hosts have registered")
        return [self._hosts[id] for id in self._order()]

    def _order(self) -> list[str]:
        """Host ids by length, then text: host-2 before host-10."""
        return sorted(self._hosts, key=lambda id: (len(id), id))

    def _check(self, report: StepReport) -> None:
        if not 0 <= report.worker < self._plan.workers:
            raise ProtocolError(
                f"worker {report.worker} is unknown: the run has {self._plan.workers} workers"
            )
        if tuple(report.loads.shape) != self._shape or report.loads.dtype != torch.int64:
            raise ProtocolError(
                f"worker {report.worker} reports loads {list(report.loads.shape)} of {report.loads.dtype}, "
                f"not {list(self._shape)} of int64"
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RaymoeError(self._failure)


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


__all__ = ["Coordinator"]
