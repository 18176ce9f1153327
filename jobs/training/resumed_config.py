"""The configuration of a run that is resumed from its latest checkpoint, and how it differs from before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from errors import ConfigError
from jobs.config.config_file import apply_override
from jobs.config.run_config import RunConfig
from model.optimizers.schedule import learning_rate

# Fields that determine the rows of a run and their order; data.path may change, if the corpus has moved.
_KEPT = {
    "training": ("seed", "batch_size", "sequence_length"),
    "data": ("text_field", "on_bad_record", "tokenizer", "validation_fraction"),
}


def resumed_config(
    run: Path, overrides: Sequence[str] = (), *, note: Callable[[str], None] | None = None
) -> RunConfig:
    """The configuration of a run's latest checkpoint, with overrides.

    Args:
        note: Called with one line for each way in which the run goes on differently.

    Raises:
        CheckpointError: The run has no checkpoint, or a damaged one.
        ConfigError: An override is invalid, or changes the model's shape or the rows of the run.
    """
    from jobs.checkpoints.checkpoint_store import find_checkpoint, read_state, run_config

    checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    old = run_config(checkpoint, state)
    values = copy.deepcopy(state.config)
    values.setdefault("training", {})["profile_steps"] = 0  # only the first start of a run is profiled
    for override in overrides:
        apply_override(values, override)
    config = RunConfig.from_dict(values)
    if config.model != old.model:
        raise ConfigError("--set model.…: a resumed run keeps the shape of its model; leave it out")
    for section, names in _KEPT.items():
        for name in names:
            if getattr(getattr(config, section), name) != getattr(getattr(old, section), name):
                raise ConfigError(
                    f"--set {section}.{name}: a resumed run keeps its rows and their order, "
                    "which this would change; leave it out, or begin another run with --init"
                )
    if note is not None:
        for line in changes(old, config, step=state.step):
            note(line)
    return config


def changes(before: RunConfig, now: RunConfig, *, step: int) -> Iterator[str]:
    """One line for each changed field, and for what they change in how the run goes on.

    Args:
        step: Number of steps that the run has behind it.
    """
    from jobs.config.device_and_dtype import resolve_dtype

    old, new = dict(_fields(before.to_dict())), dict(_fields(now.to_dict()))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name != "training.profile_steps":
            yield f"--resume: {name} is {_written(new.get(name))}, was {_written(old.get(name))}"
    last, as_planned, rate = (
        _rate(config, at) for config, at in ((before, max(0, step - 1)), (before, step), (now, step))
    )
    if rate != as_planned:
        times = f"{rate / last:.3g} times " if last else ""
        yield (
            f"--resume: the learning rate of step {step + 1} is {rate:.3g}, {times}the {last:.3g} of step "
            f"{step}; without the changes it would be {as_planned:.3g}"
        )
    computed, computes = resolve_dtype(before), resolve_dtype(now)
    if computes != computed:
        yield (
            f"--resume: steps are computed in {_name(computes)} from here on, in {_name(computed)} before; "
            "losses differ by its rounding"
        )


def _fields(values: dict[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration by their paths."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", value


def _rate(config: RunConfig, step: int) -> float:
    training = config.training
    return learning_rate(
        step,
        peak=training.learning_rate,
        warmup_steps=training.warmup_steps,
        total_steps=training.steps,
        min_ratio=training.min_learning_rate_ratio,
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["changes", "resumed_config"]
