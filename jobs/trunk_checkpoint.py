"""The trunk's part of a checkpoint: its weights under Hugging Face's names, and AdamW's moments of them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model.checkpoint import ShardReader, trunk_tensors, write_shard
from model.optimizer import AdamW
from model.transformer import Transformer

_WEIGHTS = "model-trunk.safetensors"
_MOMENTS = "optimizer-trunk.safetensors"
_KINDS = ("exp_avg", "exp_avg_sq")


def save_trunk(directory: Path, model: Transformer, optimizer: AdamW) -> None:
    """Write weights and moments of everything but the routed experts into a checkpoint in the making."""
    state = {**model.state_dict(), **optimizer.values()}
    write_shard(directory / _WEIGHTS, trunk_tensors(model.config, state))
    moments = {
        f"{name}.{kind}": moment
        for name, pair in optimizer.moments().items()
        for kind, moment in zip(_KINDS, pair, strict=True)
    }
    write_shard(directory / _MOMENTS, moments)


def load_trunk_moments(directory: Path, optimizer: AdamW, *, step: int) -> None:
    """Take over the moments that `save_trunk` wrote, `step` steps into the run.

    Raises:
        CheckpointError: missing, or of another shape.
    """
    reader = ShardReader(directory / _MOMENTS)
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for name in optimizer.moments():
        first, second = (reader.tensor(f"{name}.{kind}") for kind in _KINDS)
        moments[name] = (first, second)
    optimizer.load_moments(moments, step=step)


__all__ = ["load_trunk_moments", "save_trunk"]
