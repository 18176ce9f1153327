"""An expert host's part of a checkpoint: its weights under Hugging Face's names, and AdamW's moments.

A host writes `model-<host>.safetensors` and `optimizer-<host>.safetensors`. Every tensor belongs to one
expert, so that hosts of another placement can read only the experts that they hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from errors import CheckpointError
from model.checkpoints.hf_names import expert_names, expert_tensors
from model.checkpoints.shards import ShardReader, write_shard

Pair = tuple[Tensor, Tensor]
_KINDS = ("exp_avg", "exp_avg_sq")


class MomentSource(Protocol):
    """A source of the optimizer moments of experts."""

    def moments(self, layer: int, expert: int) -> tuple[Pair, Pair]:
        """(exp_avg, exp_avg_sq) of w13 [2I, D], and (exp_avg, exp_avg_sq) of w2 [D, I]."""
        ...


def save_experts(
    directory: Path,
    host_id: str,
    weights: Iterable[tuple[int, int, Tensor, Tensor]],
    moments: Iterable[tuple[int, int, Pair, Pair]],
) -> list[str]:
    """Write a host's experts and return the names of the files.

    Args:
        directory: An existing directory.
        host_id: Id of the host.
        weights: Layer, expert, w13 and w2 of each expert.
        moments: Layer, expert and (exp_avg, exp_avg_sq) of w13 and w2; empty when the host does not train.
    """
    files = []
    named = {
        name: tensor for layer, e, w13, w2 in weights for name, tensor in expert_tensors(layer, e, w13, w2)
    }
    state = {
        f"{name}.{kind}": tensor
        for layer, e, of_w13, of_w2 in moments
        for kind, w13, w2 in zip(_KINDS, of_w13, of_w2, strict=True)
        for name, tensor in expert_tensors(layer, e, w13, w2)
    }
    for prefix, tensors in (("model", named), ("optimizer", state)):
        if tensors:
            files.append(f"{prefix}-{host_id}.safetensors")
            write_shard(directory / files[-1], tensors)
    return files


class SavedMoments:
    """The moments in the `optimizer-*.safetensors` files of a checkpoint, whose experts may lie in any file.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._readers: dict[str, ShardReader] = {}
        for path in sorted(directory.glob("optimizer-*.safetensors")):
            reader = ShardReader(path)
            self._readers.update(dict.fromkeys(reader.names, reader))

    def moments(self, layer: int, expert: int) -> tuple[Pair, Pair]:
        """The moments of an expert.

        Raises:
            CheckpointError: the expert's moments are missing.
        """
        first, second = (self._of(layer, expert, kind) for kind in _KINDS)
        return (first[0], second[0]), (first[1], second[1])

    def _of(self, layer: int, expert: int, kind: str) -> Pair:
        gate, up, down = (self._tensor(f"{name}.{kind}") for name in expert_names(layer, expert))
        return torch.cat((gate, up)), down

    def _tensor(self, name: str) -> Tensor:
        reader = self._readers.get(name)
        if reader is None:
            raise CheckpointError(
                f"{self._directory} has no {name}: its optimizer state is incomplete; use another checkpoint"
            )
        return reader.tensor(name)


__all__ = ["MomentSource", "Pair", "SavedMoments", "save_experts"]
