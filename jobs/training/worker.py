"""One data-parallel worker of a training run: the loop over its steps, evaluations and checkpoints.

Plain class; `jobs.training.ray_worker` runs it under Ray Train, tests run it in threads.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from actors.messages.steps import Resume, StepDecision
from actors.trunk import TrunkWorker
from actors.trunk.step_inputs import StepInputs
from cluster.topology import RoutingTable
from errors import Interrupted, RaymoeError, gives_way
from jobs.config.run_config import RunConfig
from jobs.data.batches import microbatch_rows, microbatches_of_worker, rows_of_step
from jobs.data.corpus import PreparedData
from jobs.training.held_out_evaluation import HeldOutEvaluation, Validation, microbatch
from jobs.training.metrics_file import MetricsWriter
from jobs.training.step_coordinator import StepCoordinator
from jobs.training.worker_checkpoints import WorkerCheckpoints
from jobs.training.worker_group import WorkerGroup
from jobs.training.worker_recovery import WorkerRecovery
from model.balance_loss import BalanceWeights
from model.optimizers.schedule import value_at

_AWAY_SECONDS = 0.05  # between two calls of a coordinator that does not answer


class TrainingWorker:
    """Runs the steps of one worker until the coordinator's decision stops the run.

    Args:
        config: The run's configuration.
        data: The run's documents.
        group: This worker's place among the workers.
        output: The run's directory, where worker 0 writes metrics.
        trunk: The worker's trunk.
        coordinator: Decides each step.
        checkpoints: Write the run's checkpoints.
        recovery: Restores the trunk after a loss; None with experts in this process.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        *,
        group: WorkerGroup,
        output: Path,
        trunk: TrunkWorker,
        coordinator: StepCoordinator,
        checkpoints: WorkerCheckpoints,
        recovery: WorkerRecovery | None,
    ) -> None:
        self._config, self._data, self._group, self._output = config, data, group, output
        self._trunk, self._coordinator = trunk, coordinator
        self._checkpoints, self._recovery = checkpoints, recovery
        self._evaluation = HeldOutEvaluation(config, data, group=group, trunk=trunk, output=output)
        self._validation: Validation | None = None
        self._step = 0  # until `join` returns the run's step

    def run(self) -> None:
        """Train until the coordinator's decision stops the run; after a loss, from the last common step."""
        attempt, why = -1, ""
        while True:
            resume, table = self._join(attempt, why)
            attempt = resume.attempt
            try:
                self._take_up(resume, table)
                self._train()
                return
            except RaymoeError as error:
                if not gives_way(error):
                    raise
                why = str(error)

    def _join(self, attempt: int, why: str) -> tuple[Resume, RoutingTable | None]:
        """Join the run; the step that it is at, and the routing table if experts are on hosts."""
        group, deadline = self._group, time.monotonic() + self._config.cluster.start_timeout
        while True:
            try:
                resume = self._coordinator.join(group.rank, group.workers, attempt, why)
                attempt = resume.attempt
                return resume, None if self._recovery is None else self._coordinator.table()
            except RaymoeError as error:
                # The coordinator is being restarted, or another host was lost.
                if not gives_way(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_AWAY_SECONDS)

    def _take_up(self, resume: Resume, table: RoutingTable | None) -> None:
        """Set the worker to the step that the run is at."""
        if self._recovery is not None and table is not None:
            self._recovery.restore(resume, table)
        self._step, self._trunk.agreement.attempt = resume.step, resume.attempt
        self._keep()

    def _train(self) -> None:
        """Run steps until the run stops; worker 0 writes the metrics."""
        if self._group.rank:
            self._loop(None)
        else:
            tensorboard = self._config.training.tensorboard
            with MetricsWriter(self._output, first_step=self._step, tensorboard=tensorboard) as writer:
                self._loop(writer)
        self._trunk.agreement.agree()  # a loss before the last checkpoint needs all workers again

    def _keep(self) -> None:
        """Take a snapshot of the trunk in memory, to which the run can go back."""
        if self._recovery is not None:
            self._recovery.keep(self._step)

    def _loop(self, writer: MetricsWriter | None) -> None:
        interval = self._config.training.eval_interval
        stop = self._step >= self._config.training.steps
        while not stop:
            start = time.perf_counter()
            decision = self._coordinator.report(self._trunk.run(self.inputs(self._step)))
            self._trunk.apply(decision)
            seconds = time.perf_counter() - start
            self._step, stop = decision.step + 1, decision.stop
            self._follow(decision.epoch)
            last = self._step >= self._config.training.steps
            found: Validation | None = None
            if last or (interval and self._step % interval == 0):
                found = self._validation = self._evaluation.run(self._step, everything=last)
            if writer is not None:
                self._write(writer, decision, seconds, found)
            if decision.checkpoint:
                self._checkpoints.write(self._step, self._validation)
            if decision.snapshot:  # last: a run that goes back to this step repeats none of the above
                self._keep()

    def _follow(self, epoch: int) -> None:
        """Fetch the routing table of the next step if its placement epoch is another one."""
        if self._recovery is not None and epoch != self._recovery.router.table.epoch:
            self._recovery.router.set_table(self._coordinator.table())

    def inputs(self, step: int) -> StepInputs:
        """This worker's microbatches of a step, a function of the step alone."""
        training, group = self._config.training, self._group
        corpus = self._data.train
        rows = rows_of_step(step, n_rows=corpus.n_rows, batch_size=training.batch_size, seed=training.seed)
        mine = microbatches_of_worker(group.rank, group.workers, self._config.microbatches)
        return StepInputs(
            step=step,
            microbatches=tuple(
                microbatch(corpus, at, microbatch_rows(rows, training.microbatch_size, at).tolist())
                for at in mine
            ),
            n_targets=max(1, corpus.count_targets(rows.tolist())),
            n_rows=len(rows),
            passes=-(-self._config.microbatches // group.workers),
            balance=BalanceWeights.at(self._config.balance, step),
            mtp_weight=value_at(self._config.mtp.weight, step),
        )

    def _write(
        self, writer: MetricsWriter, decision: StepDecision, seconds: float, validation: Validation | None
    ) -> None:
        """Write the metrics of a step, with those of the evaluation after it if there was one."""
        found = self._coordinator.metrics(decision.step - 1)
        if not found:  # the coordinator that decided the step is gone
            raise Interrupted(
                f"the metrics of step {decision.step} were lost with the coordinator; the step is repeated"
            )
        step = found[0]
        violation = step.max_violation
        values: dict[str, Any] = {
            "step": self._step,
            "loss": step.total(value_at(self._config.mtp.weight, decision.step)),
            "main_loss": step.loss,
            "mtp_loss": step.mtp_loss,
            "balance_loss": step.balance_loss,
            "lr": decision.learning_rate,
            "grad_norm": decision.grad_norm,
            "tokens": step.tokens,
            "tokens_per_second": step.tokens / seconds,
            "max_violation": dict(zip(map(str, self._config.model.moe_layers), violation, strict=True)),
            "max_violation_mean": sum(violation) / max(1, len(violation)),
            "bias_min": float(decision.bias.min()),
            "bias_max": float(decision.bias.max()),
            "hosts_per_token": step.hosts_per_token,
            "bytes_per_token": step.bytes / step.tokens,
        }
        if validation is not None:
            values["validation_loss"] = validation.loss
            values["mtp_acceptance"] = list(validation.acceptance)
            if not math.isnan(validation.bits_per_byte):
                values["bits_per_byte"] = validation.bits_per_byte
        writer.write(values)


__all__ = ["TrainingWorker"]
