"""Evaluation of a model in training on the held-out documents, shared by all workers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from actors.trunk import TrunkWorker
from actors.trunk.step_inputs import Microbatch
from errors import RaymoeError, gives_way
from jobs.config.run_config import RunConfig
from jobs.data.corpus import PreparedData
from jobs.data.packing import PackedCorpus
from jobs.training.worker_group import WorkerGroup

VALIDATION_FILE = "validation.json"
"""Name of the file, in the run's directory, with the result of the last evaluation on all documents."""

_EVALUATED_AT_ONCE = 2048  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Result of an evaluation.

    Attributes:
        loss: Nats per token.
        bits_per_byte: Bits per byte of the documents; NaN if only some of the rows were evaluated.
        acceptance: For each MTP module, the share of its greedy drafts that the main model agrees with.
        n_targets: Number of tokens evaluated.
    """

    loss: float
    bits_per_byte: float
    acceptance: tuple[float, ...]
    n_targets: int


class HeldOutEvaluation:
    """Evaluates the model on the held-out rows, each worker on its share.

    Args:
        config: The run's configuration.
        data: The run's documents.
        group: This worker's place among the workers.
        trunk: The worker's trunk.
        output: The run's directory, where worker 0 writes `VALIDATION_FILE`.
    """

    def __init__(
        self, config: RunConfig, data: PreparedData, *, group: WorkerGroup, trunk: TrunkWorker, output: Path
    ) -> None:
        self._config, self._data, self._group = config, data, group
        self._trunk, self._output = trunk, output

    def run(self, step: int, *, everything: bool) -> Validation:
        """Evaluate after `step` steps. All workers call this together.

        Args:
            everything: Evaluate all held-out rows, not only the first `training.eval_rows`.

        Raises:
            RaymoeError: An expert host or another worker was lost; all workers raise.
        """
        training, corpus, group = self._config.training, self._data.held_out.rows, self._group
        n_rows = corpus.n_rows if everything else min(corpus.n_rows, training.eval_rows or corpus.n_rows)
        # No activations are kept for a backward pass, so many short rows fit into one forward pass.
        size = max(training.microbatch_size, _EVALUATED_AT_ONCE // corpus.sequence_length)
        starts = range(group.rank * size, n_rows, group.workers * size)
        rows = [microbatch(corpus, at, range(at, min(at + size, n_rows))) for at in starts]
        passes = len(range(0, n_rows, group.workers * size))
        loss: RaymoeError | None = None
        self._trunk.agreement.meet()
        try:
            judged, loads = self._trunk.evaluate(step, rows, passes=passes)
        except RaymoeError as error:
            if not gives_way(error):
                raise
            loss = error
        self._trunk.agreement.agree(loss)
        depth = self._config.model.num_nextn_predict_layers
        sums = torch.zeros(2 + 2 * depth, dtype=torch.float64)
        for one in judged:
            sums += torch.tensor([one.nll, one.n_targets, *one.accepted, *one.drafted], dtype=torch.float64)
        group.reducer.all_reduce([sums, loads])
        nll, n_targets = float(sums[0]), int(sums[1])
        accepted, drafted = sums[2 : 2 + depth].tolist(), sums[2 + depth :].tolist()
        vocab_size = self._config.model.vocab_size
        bits = self._data.held_out.bits_per_byte(nll, vocab_size) if everything else math.nan
        found = Validation(
            loss=nll / max(1, n_targets),
            bits_per_byte=bits,
            acceptance=tuple(a / max(1.0, d) for a, d in zip(accepted, drafted, strict=True)),
            n_targets=n_targets,
        )
        if everything and group.rank == 0:
            values = {**asdict(found), "step": step, "expert_load": loads.tolist()}
            _write_json(self._output / VALIDATION_FILE, values)
        return found


def microbatch(corpus: PackedCorpus, index: int, rows: Sequence[int]) -> Microbatch:
    """Rows of a corpus as one microbatch; without segments if no row holds more than one document."""
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


__all__ = ["VALIDATION_FILE", "HeldOutEvaluation", "Validation", "microbatch"]
