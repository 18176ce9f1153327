"""Reads config.json of a checkpoint, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errors import CheckpointError, ConfigError
from model.checkpoints.guarded_files import CONFIG
from model.config import ModelConfig


def model_config(directory: Path, values: dict[str, Any] | None = None) -> ModelConfig:
    """The model's configuration as config.json says it, whether or not the weights of MTP modules are there.

    Args:
        directory: The checkpoint's directory.
        values: What `read_hf_config` returned; None reads it.

    Raises:
        CheckpointError: The file is missing, damaged, or of another architecture.
    """
    values = read_hf_config(directory) if values is None else values
    try:
        return ModelConfig.from_hf(values)
    except ConfigError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def read_hf_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: The file is missing, no JSON object, or beyond the limits of its kind.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give one with config.json and safetensors files")
    try:
        return CONFIG.json(directory / "config.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no config.json; give a checkpoint in Hugging Face's format"
        ) from None


__all__ = ["model_config", "read_hf_config"]
