"""The weights of a served model: version name, dtype, and whether other weights can replace them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from errors import CheckpointError, ResourceError
from jobs.checkpoints.loaded_model import compute_dtype
from jobs.checkpoints.memory_need import free_memory
from jobs.data.tokenizer import ModelTokenizer, load_tokenizer
from jobs.serving.config import ServeConfig
from model.checkpoints.pretrained import PretrainedSource
from model.config import ModelConfig

_MIB = 1 << 20


_FREE = {"initializer_range"}  # has no effect after training has started


def require_room(size: int, who: str) -> None:
    """Check that there is memory for other weights beside those in use; without it the kernel kills the
    process.

    Args:
        size: Bytes of the other weights.
        who: The process that needs them, for the error.

    Raises:
        ResourceError: There are not so many bytes free.
    """
    free = free_memory()
    if size > free:
        raise ResourceError(
            f"{who} needs {size / _MIB:,.0f} MiB for other weights beside those in use, and its machine has "
            f"{free / _MIB:,.0f} MiB free; deploy the checkpoint as a new application instead"
        )


def serving_dtype(config: ServeConfig, directory: Path) -> torch.dtype:
    """The dtype of trunk, rows and experts: the configured one, or what `auto` stands for."""
    if config.serving.dtype == "auto":
        return compute_dtype(directory, on_gpus=config.on_gpus)
    dtype: torch.dtype = getattr(torch, config.serving.dtype)
    return dtype


def model_name(directory: Path) -> str:
    """The name of a model for clients: of a run's checkpoint the run's, of any other directory its own."""
    above = directory.parent
    is_checkpoint = directory.name.startswith("step-") and above.name == "checkpoints"
    return (above.parent.name if is_checkpoint else "") or directory.name


def weights_version(directory: Path) -> str:
    """A short name for the weights in a directory, from the names, sizes and times of its files."""
    digest = hashlib.blake2s(digest_size=6)
    for file in sorted(directory.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{directory.name}-{digest.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Properties that weights must share with those that they replace while requests are running."""

    model: ModelConfig
    dtype: torch.dtype
    text: ModelTokenizer

    @classmethod
    def of(cls, config: ServeConfig, directory: Path) -> Self:
        """The properties of a checkpoint, whose tensors are checked.

        Raises:
            CheckpointError: A tensor is missing or has another shape than config.json says.
            DataError: There is no tokenizer.
        """
        source = PretrainedSource(directory)
        source.check()
        return cls(
            model=source.config,
            dtype=serving_dtype(config, directory),
            text=load_tokenizer(directory, source.config.vocab_size),
        )

    def refuse_other(self, other: ModelShape, directory: Path) -> None:
        """Check that other weights can replace these.

        Raises:
            CheckpointError: They differ; the message says in which property.
        """
        here, there = self.model.model_dump(), other.model.model_dump()
        for field, value in here.items():
            if field not in _FREE and there[field] != value:
                raise CheckpointError(
                    f"{directory}: config.json: {field} is {there[field]}, and the served model has {value}; "
                    "a reload keeps the model's shape, so deploy this checkpoint as a new application"
                )
        if other.dtype != self.dtype:
            raise CheckpointError(
                f"{directory}: its dtype is {other.dtype}, and that of the served model {self.dtype}; "
                "set serving.dtype for the deployment"
            )
        if other.text.tokenizer.to_str() != self.text.tokenizer.to_str():
            raise CheckpointError(
                f"{directory}: tokenizer.json differs from the served model's, with which running requests "
                "were tokenized; deploy this checkpoint as a new application"
            )
        if other.text.ends != self.text.ends:
            raise CheckpointError(
                f"{directory}: its end tokens (eos_token_id) are {sorted(other.text.ends)}, and those of the "
                f"served model {sorted(self.text.ends)}; deploy this checkpoint as a new application"
            )


__all__ = ["ModelShape", "model_name", "require_room", "serving_dtype", "weights_version"]
