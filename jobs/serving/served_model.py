"""The weights of a served model: their name, their dtype, and whether others can replace them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer

from errors import CheckpointError, ResourceError
from jobs.checkpoints.loaded_model import compute_dtype
from jobs.checkpoints.memory_need import free_memory
from jobs.data.tokenizer import load_tokenizer
from jobs.serving.config import ServeConfig
from model.checkpoints.pretrained import PretrainedSource
from model.config import ModelConfig

_MIB = 1 << 20


_FREE = {"initializer_range"}  # says how training began, nothing about what is computed


def require_room(size: int, who: str) -> None:
    """Refuse weights beside those in use that this machine cannot hold: who is killed for it cannot say so.

    Args:
        size: bytes.
        who: needs them.

    Raises:
        ResourceError: so many bytes are not free.
    """
    free = free_memory()
    if size > free:
        raise ResourceError(
            f"{who} needs {size / _MIB:,.0f} MiB for other weights beside those in use, and its machine has "
            f"{free / _MIB:,.0f} MiB free; deploy the checkpoint anew instead"
        )


def serving_dtype(config: ServeConfig, directory: Path) -> torch.dtype:
    """Of trunk, rows and experts: the weights' own where what computes does so in it, else float32."""
    if config.serving.dtype == "auto":
        return compute_dtype(directory, on_gpus=config.on_gpus)
    dtype: torch.dtype = getattr(torch, config.serving.dtype)
    return dtype


def weights_version(directory: Path) -> str:
    """A short name of a directory's weights: equal for equal files, as far as names, sizes and times tell."""
    digest = hashlib.blake2s(digest_size=6)
    for file in sorted(directory.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{directory.name}-{digest.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What weights must share with those that they replace under requests on their way."""

    model: ModelConfig
    dtype: torch.dtype
    tokenizer: Tokenizer
    end_of_text: int

    @classmethod
    def of(cls, config: ServeConfig, directory: Path) -> Self:
        """Of a checkpoint, all of whose tensors are there and of the shape that its config.json says.

        Raises:
            CheckpointError: they are not.
            DataError: there is no tokenizer.
        """
        source = PretrainedSource(directory)
        source.check()
        tokenizer, end_of_text = load_tokenizer(directory, source.config.vocab_size)
        return cls(
            model=source.config,
            dtype=serving_dtype(config, directory),
            tokenizer=tokenizer,
            end_of_text=end_of_text,
        )

    def refuse_other(self, other: ModelShape, directory: Path) -> None:
        """Hold weights against these.

        Raises:
            CheckpointError: they differ, naming in what.
        """
        here, there = self.model.model_dump(), other.model.model_dump()
        for field, value in here.items():
            if field not in _FREE and there[field] != value:
                raise CheckpointError(
                    f"{directory}: config.json: {field} is {there[field]}, the model that is served has "
                    f"{value}; a reload keeps the shape, deploy this one on its own"
                )
        if other.dtype != self.dtype:
            raise CheckpointError(
                f"{directory}: its weights are to be computed in {other.dtype}, the model that is served in "
                f"{self.dtype}; set serving.dtype when it is deployed"
            )
        same_text = other.tokenizer.to_str() == self.tokenizer.to_str()
        if not same_text or other.end_of_text != self.end_of_text:
            raise CheckpointError(
                f"{directory}: tokenizer.json differs from the served model's, whose tokens requests on "
                "their way are made of; deploy this one on its own"
            )


__all__ = ["ModelShape", "require_room", "serving_dtype", "weights_version"]
