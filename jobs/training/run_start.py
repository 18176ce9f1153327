"""The step, weights and optimizer state with which a run starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.host.checkpoint_part import MomentSource, SavedMoments
from jobs.checkpoints.checkpoint_store import read_state
from jobs.config.device_and_dtype import resolve_dtype
from jobs.config.run_config import RunConfig
from model.checkpoints.pretrained import PretrainedSource, RandomSource, WeightSource
from model.optimizers.adamw import value_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """Where a run starts.

    Attributes:
        run: Name of the run, part of every request's id.
        step: Number of optimizer steps that the weights have behind them.
        weights: A checkpoint or Hugging Face directory; None draws random weights from the seed.
        moments: Whether `weights` also holds the optimizer's state, which is then loaded.
    """

    run: str
    step: int = 0
    weights: Path | None = None
    moments: bool = False

    def at(self, directory: str) -> RunStart:
        """The same run started from another of its checkpoints; for an empty name, this start itself."""
        if not directory:
            return self
        path = Path(directory)
        return RunStart(run=self.run, step=read_state(path).step, weights=path, moments=True)


def weight_source(config: RunConfig, start: RunStart) -> WeightSource:
    """The source from which the trunk and the expert hosts read their weights."""
    if start.weights is not None:
        return PretrainedSource(start.weights, config.model)
    return RandomSource(config.model, config.training.seed, value_dtype(resolve_dtype(config)))


def moment_source(start: RunStart) -> MomentSource | None:
    """The source from which expert hosts read AdamW's moments; None if the run starts without moments."""
    return SavedMoments(start.weights) if start.moments and start.weights is not None else None


__all__ = ["RunStart", "moment_source", "weight_source"]
