"""The trunk's part of a checkpoint: weights under Hugging Face's names, and AdamW's moments."""

from __future__ import annotations

from pathlib import Path

from actors.trunk.parameters import TrunkParameters
from model.checkpoints.pretrained import ShardReader, trunk_tensors, write_shard

_WEIGHTS = "model-trunk.safetensors"
_MOMENTS = "optimizer-trunk.safetensors"


def save_trunk(directory: Path | None, trunk: TrunkParameters) -> None:
    """Write the weights and moments of everything but the routed experts into a checkpoint.

    With a sharded trunk all workers call this together.

    Args:
        directory: The checkpoint's directory; None if another worker writes.
    """
    if directory is None:
        _take_part(trunk)
        return
    write_shard(directory / _WEIGHTS, trunk_tensors(trunk.model.config, dict(trunk.whole())))
    moments = {f"{name}.{kind}": moment for name, kind, moment in trunk.whole_moments()}
    write_shard(directory / _MOMENTS, moments)


def load_trunk_moments(directory: Path, trunk: TrunkParameters, *, step: int) -> None:
    """Load the moments that `save_trunk` wrote after `step` steps.

    Raises:
        CheckpointError: They are missing, or of another shape.
    """
    reader = ShardReader(directory / _MOMENTS)
    trunk.load_moments(lambda name, kind: reader.tensor(f"{name}.{kind}"), step)


def _take_part(trunk: TrunkParameters) -> None:
    if trunk.together:
        for _ in trunk.whole():
            continue
        for _ in trunk.whole_moments():
            continue


__all__ = ["load_trunk_moments", "save_trunk"]
