"""One data-parallel worker of a training run: trunk, router, data, evaluation and its part of checkpoints.

Plain class; `jobs.training.train` runs it under Ray Train, tests run it in threads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport
from actors.router import Router
from actors.trunk import TrunkWorker
from actors.trunk.parameters import Reducer, SingleWorker
from actors.trunk.snapshots import TrunkSnapshots
from actors.trunk.step_inputs import Microbatch, StepInputs
from cluster.topology import RoutingTable
from errors import Interrupted, RaymoeError, gives_way
from jobs.checkpoints.checkpoint_store import CheckpointStore, TrainingState
from jobs.config.run_config import RunConfig
from jobs.data.batches import microbatch_rows, microbatches_of_worker, rows_of_step
from jobs.data.corpus import PreparedData
from jobs.data.packing import PackedCorpus
from jobs.training.metrics_file import MetricsWriter
from model.balance_loss import BalanceWeights
from model.checkpoints.pretrained import require_experts, write_index, write_model_config
from model.optimizers.schedule import value_at

VALIDATION_FILE = "validation.json"
_EVALUATED_AT_ONCE = 2048  # tokens
_AWAY_SECONDS = 0.05  # between two calls of a coordinator that does not answer


class StepCoordinator(Protocol):
    """What a worker asks of the coordinator; `Coordinator` itself, or a client of one."""

    def join(self, rank: int, workers: int, attempt: int, why: str) -> Resume: ...

    def table(self) -> RoutingTable: ...

    def report(self, report: StepReport) -> StepDecision: ...

    def save(self, directory: str, step: int) -> list[str]: ...

    def metrics(self, since_step: int = -1) -> list[StepMetrics]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What an evaluation found.

    Attributes:
        loss: nats per token.
        bits_per_byte: over the documents' bytes; NaN when only some rows were judged.
        acceptance: of each MTP module, share of greedy drafts that the main model agrees with.
        n_targets: tokens judged.
    """

    loss: float
    bits_per_byte: float
    acceptance: tuple[float, ...]
    n_targets: int


class TrainingWorker:
    """Runs the steps of one worker from `first_step` until the coordinator says stop.

    Args:
        rank, workers: of the data-parallel group.
        output: the run's directory; worker 0 writes metrics, validation and the trunk's checkpoints.
        save_trunk: writes the trunk into a directory; with None, does its part while another worker writes.
        save_experts: writes experts that live in this process; None when hosts do that themselves.
        router: the way to the hosts; None with experts in this process.
        snapshots: the trunk's states in memory; None with experts in this process.
        begin_again: goes back to a checkpoint, or with an empty name to what the run began with.
        patience: seconds to wait for a coordinator that is away.
        begun_with: the checkpoint that the run began with, which new processes of it read.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        *,
        rank: int,
        workers: int,
        first_step: int,
        output: Path,
        trunk: TrunkWorker,
        coordinator: StepCoordinator,
        save_trunk: Callable[[Path | None], None],
        save_experts: Callable[[Path], object] | None = None,
        router: Router | None = None,
        snapshots: TrunkSnapshots | None = None,
        begin_again: Callable[[str], None] | None = None,
        reducer: Reducer | None = None,
        patience: float = 120.0,
        begun_with: Path | None = None,
    ) -> None:
        self._config = config
        self._data = data
        self._rank, self._workers = rank, workers
        self._step = first_step
        self._output = output
        self._trunk = trunk
        self._coordinator = coordinator
        self._save_trunk = save_trunk
        self._save_experts = save_experts
        self._router, self._snapshots, self._begin_again = router, snapshots, begin_again
        self._patience = patience
        self._reducer = reducer or SingleWorker()
        self._store = CheckpointStore(output / "checkpoints", keep=config.checkpoint.keep, needed=begun_with)
        self._validation: Validation | None = None

    def run(self) -> None:
        """Train until the coordinator says stop; after a loss on the way, from the last common step on."""
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
        """Become part of the run: what it is at."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                resume = self._coordinator.join(self._rank, self._workers, attempt, why)
                attempt = resume.attempt
                return resume, None if self._router is None else self._coordinator.table()
            except RaymoeError as error:
                # The coordinator is away, and will be back; or a host was lost again.
                if not gives_way(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_AWAY_SECONDS)

    def _take_up(self, resume: Resume, table: RoutingTable | None) -> None:
        """Go to where the run is."""
        if self._router is not None and table is not None:
            self._router.set_table(table)
        if self._snapshots is not None and resume.trunk:
            self._snapshots.restore(resume.step, resume.trunk)
        elif resume.directory is not None and self._begin_again is not None:
            self._begin_again(resume.directory)
        self._step, self._trunk.agreement.attempt = resume.step, resume.attempt
        self._keep()

    def _train(self) -> None:
        """Steps until the run stops. Worker 0 writes down what happened."""
        if self._rank:
            self._loop(None)
        else:
            tensorboard = self._config.training.tensorboard
            with MetricsWriter(self._output, first_step=self._step, tensorboard=tensorboard) as writer:
                self._loop(writer)
        self._trunk.agreement.agree()  # until the last checkpoint is there, a loss may need all of them again

    def _keep(self) -> None:
        """Keep the trunk in memory, so that the run can go back to here."""
        if self._snapshots is not None and self._router is not None:
            self._snapshots.keep(self._step, self._router.table.hosts)

    def _loop(self, writer: MetricsWriter | None) -> None:
        interval = self._config.training.eval_interval
        stop = self._step >= self._config.training.steps
        while not stop:
            start = time.perf_counter()
            decision = self._coordinator.report(self._trunk.run(self.inputs(self._step)))
            self._trunk.apply(decision)
            seconds = time.perf_counter() - start
            self._step, stop = decision.step + 1, decision.stop
            if self._router is not None and decision.epoch != self._router.table.epoch:
                self._router.set_table(self._coordinator.table())
            last = self._step >= self._config.training.steps
            if last or (interval and self._step % interval == 0):
                self._evaluate(everything=last)
            if writer is not None:
                self._write(writer, decision, seconds)
            if decision.checkpoint:
                self._checkpoint(decision)
            if decision.snapshot:  # at last: whoever comes back to this step has nothing left to do for it
                self._keep()

    def inputs(self, step: int) -> StepInputs:
        """This worker's microbatches of a step: a function of the step alone."""
        training = self._config.training
        corpus = self._data.train
        rows = rows_of_step(step, n_rows=corpus.n_rows, batch_size=training.batch_size, seed=training.seed)
        mine = microbatches_of_worker(self._rank, self._workers, self._config.microbatches)
        return StepInputs(
            step=step,
            microbatches=tuple(
                _microbatch(corpus, at, microbatch_rows(rows, training.microbatch_size, at).tolist())
                for at in mine
            ),
            n_targets=max(1, corpus.count_targets(rows.tolist())),
            n_rows=len(rows),
            passes=-(-self._config.microbatches // self._workers),
            balance=BalanceWeights.at(self._config.balance, step),
            mtp_weight=value_at(self._config.mtp.weight, step),
        )

    def _evaluate(self, *, everything: bool) -> None:
        training, corpus = self._config.training, self._data.held_out.rows
        n_rows = corpus.n_rows if everything else min(corpus.n_rows, training.eval_rows or corpus.n_rows)
        # Nothing is kept for a backward pass, so short rows can go through many at once.
        size = max(training.microbatch_size, _EVALUATED_AT_ONCE // corpus.sequence_length)
        starts = range(self._rank * size, n_rows, self._workers * size)
        rows = [_microbatch(corpus, at, range(at, min(at + size, n_rows))) for at in starts]
        passes = len(range(0, n_rows, self._workers * size))
        loss: RaymoeError | None = None
        self._trunk.agreement.meet()
        try:
            judged, loads = self._trunk.evaluate(self._step, rows, passes=passes)
        except RaymoeError as error:
            if not gives_way(error):
                raise
            loss = error
        self._trunk.agreement.agree(loss)
        depth = self._config.model.num_nextn_predict_layers
        sums = torch.zeros(2 + 2 * depth, dtype=torch.float64)
        for one in judged:
            sums += torch.tensor([one.nll, one.n_targets, *one.accepted, *one.drafted], dtype=torch.float64)
        self._reducer.all_reduce([sums, loads])
        nll, n_targets = float(sums[0]), int(sums[1])
        accepted, drafted = sums[2 : 2 + depth].tolist(), sums[2 + depth :].tolist()
        vocab_size = self._config.model.vocab_size
        bits = self._data.held_out.bits_per_byte(nll, vocab_size) if everything else math.nan
        self._validation = Validation(
            loss=nll / max(1, n_targets),
            bits_per_byte=bits,
            acceptance=tuple(a / max(1.0, d) for a, d in zip(accepted, drafted, strict=True)),
            n_targets=n_targets,
        )
        if everything and self._rank == 0:
            values = {**asdict(self._validation), "step": self._step, "expert_load": loads.tolist()}
            _write_json(self._output / VALIDATION_FILE, values)

    def _write(self, writer: MetricsWriter, decision: StepDecision, seconds: float) -> None:
        found = self._coordinator.metrics(decision.step - 1)
        if not found:  # the coordinator that decided it is gone
            raise Interrupted(f"nobody knows the figures of step {decision.step}; it is done again")
        step = found[0]
        violation = step.max_violation
        values: dict[str, Any] = {
            "step": self._step,
            "loss": step.loss
            + value_at(self._config.mtp.weight, decision.step) * step.mtp_loss
            + step.balance_loss,
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
        if self._validation is not None:
            values["validation_loss"] = self._validation.loss
            values["mtp_acceptance"] = list(self._validation.acceptance)
            if not math.isnan(self._validation.bits_per_byte):
                values["bits_per_byte"] = self._validation.bits_per_byte
        writer.write(values)

    def _checkpoint(self, decision: StepDecision) -> None:
        """Worker 0 and the hosts write; the next step cannot commit before worker 0 is back."""
        self._trunk.agreement.meet()
        if self._rank:
            self._save_trunk(None)
            return
        directory = self._store.begin(self._step)
        self._save_trunk(directory)
        if self._save_experts is not None:
            self._save_experts(directory)
        else:
            self._coordinator.save(str(directory), self._step)
        self._data.save_tokenizer(directory)
        write_model_config(directory, self._config.model, dtype=self._trunk.dtype)
        write_index(directory)
        require_experts(directory, self._config.model)
        validation = self._validation
        self._store.commit(
            self._step,
            TrainingState(
                step=self._step,
                bias_version=self._step,
                config=self._config.to_dict(),
                validation=None if validation is None else {"loss": validation.loss},
            ),
        )


def _microbatch(corpus: PackedCorpus, index: int, rows: Sequence[int]) -> Microbatch:
    tokens, documents = corpus.rows(rows)
    alone = bool((documents == documents[:, :1]).all() and (documents[:, 0] >= 0).all())
    return Microbatch(
        index=index,
        tokens=torch.from_numpy(tokens).long(),
        segments=None if alone else torch.from_numpy(documents),
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    making = path.with_suffix(".tmp")
    making.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    making.rename(path)


__all__ = ["VALIDATION_FILE", "StepCoordinator", "TrainingWorker", "Validation"]
