"""The configuration of a run that is resumed from its latest checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from errors import ConfigError
from jobs.config.config_file import apply_override
from jobs.config.run_config import RunConfig

# Fields that determine the rows of a run and their order; data.path may change, if the corpus has moved.
_KEPT = {
    "training": ("seed", "batch_size", "sequence_length"),
    "data": ("text_field", "tokenizer", "validation_fraction"),
}


def resumed_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run's latest checkpoint, with overrides.

    Raises:
        CheckpointError: The run has no checkpoint.
        ConfigError: An override is invalid, or changes the model's shape or the rows of the run.
    """
    from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state

    before = read_state(find_checkpoint(run)).config
    values = copy.deepcopy(before)
    values["training"]["profile_steps"] = 0  # only the first start of a run is profiled
    for override in overrides:
        apply_override(values, override)
    config = RunConfig.from_dict(values)
    old = RunConfig.from_dict(before)
    if config.model != old.model:
        raise ConfigError("--set model.…: a resumed run keeps the shape of its model; leave it out")
    for section, names in _KEPT.items():
        for name in names:
            if getattr(getattr(config, section), name) != getattr(getattr(old, section), name):
                raise ConfigError(
                    f"--set {section}.{name}: a resumed run keeps its rows and their order, "
                    "which this would change; leave it out, or begin another run with --init"
                )
    return config


__all__ = ["resumed_config"]
