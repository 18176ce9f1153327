"""Reading and writing whole models in Hugging Face's DeepSeek-V3 format, which transformers also reads.

A directory holds config.json, `*.safetensors` and, for several of these, `model.safetensors.index.json`. MTP
module k is layer num_hidden_layers + k, with copies of the shared embedding and head under its own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from errors import CheckpointError
from model.causal_lm import CausalLM
from model.checkpoints.hf_names import (
    EMBEDDING,
    HEAD,
    duplicate_names,
    empty_shapes,
    expert_names,
    expert_tensors,
)
from model.checkpoints.meta_device import meta_device
from model.checkpoints.shards import (
    INDEX,
    ShardReader,
    read_index,
    remove,
    write_index,
    write_json,
    write_shard,
)
from model.checkpoints.sources import PretrainedSource, RandomSource
from model.config import ModelConfig
from model.weight_source import WeightSource

_SHARD_BYTES = 2 << 30


def load_pretrained(directory: Path | str, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Load a DeepSeek-V3 checkpoint, its MTP modules included.

    Args:
        directory: Checkpoint in Hugging Face's format; fp8 weights are dequantised.
        dtype: Type of the weights. The logits are float32, or float64 for float64.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, incomplete, or of another architecture.
    """
    source = PretrainedSource(directory, dtype=dtype)
    with meta_device():
        model = CausalLM(source.config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.trunk.tie()
    model.load(source)
    return model


def save_pretrained(
    module: CausalLM,
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model so that `load_pretrained` and transformers' AutoModelForCausalLM read it.

    The files of weights come first and config.json last: a directory with a config.json is complete.

    Args:
        directory: Created if it does not exist; a model that is there already is replaced.
        dtype: Type in which weights are stored; None keeps their own. Biases stay float32.
        shard_bytes: Largest size of a file with more than one tensor.

    Raises:
        CheckpointError: The checkpoint cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error}; give another directory") from None
    stored = dtype or module.trunk.lm_head.weight.dtype
    shards = list(_shards(_tensors(module), stored, shard_bytes))
    files: list[str] = []
    for at, names in enumerate(shards, start=1):
        files.append(f"model-{at:05d}-of-{len(shards):05d}.safetensors")
        write_shard(directory / files[-1], {name: _stored(name, t, stored) for name, t in names.items()})
    write_index(directory, files)
    for other in directory.glob("model-*-of-*.safetensors"):
        if other.name not in files:
            remove(other)
    write_model_config(directory, module.config, dtype=stored)


def write_model_config(
    directory: Path | str, config: ModelConfig, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the config.json of a checkpoint whose weights are of `dtype`.

    Raises:
        CheckpointError: The file cannot be written.
    """
    write_json(
        Path(directory) / "config.json", {**config.to_hf(), "dtype": str(dtype).removeprefix("torch.")}
    )


def require_experts(directory: Path | str, config: ModelConfig) -> None:
    """Check that a checkpoint's index names every routed expert.

    Raises:
        CheckpointError: An expert is missing, or the index is.
    """
    named = read_index(Path(directory))
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            missing = [name for name in expert_names(layer, expert) if name not in named]
            if missing:
                raise CheckpointError(
                    f"{directory} lacks {missing[0]}: an expert host has not written its part"
                )


def trunk_tensors(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A trunk's `state_dict` as a checkpoint holds it.

    A tied head is left out; the MTP modules' duplicates and the projections of no shared experts are added.
    """
    tensors = dict(state)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    tensors.update((name, state[original]) for name, original in duplicate_names(config).items())
    dtype = state[EMBEDDING].dtype
    tensors.update((name, torch.empty(shape, dtype=dtype)) for name, shape in empty_shapes(config).items())
    return tensors


def _tensors(module: CausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from trunk_tensors(module.config, module.trunk.state_dict()).items()
    for layer in module.config.moe_layers:
        w13, w2 = (weight.detach() for weight in module.experts.weights(layer))
        for expert in range(module.config.n_routed_experts):
            yield from expert_tensors(layer, expert, w13[expert], w2[expert])


def _shards(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        grown = tensor.numel() * dtype.itemsize
        if shard and size + grown > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += grown
    if shard:
        yield shard


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)


__all__ = [
    "INDEX",
    "CausalLM",
    "PretrainedSource",
    "RandomSource",
    "ShardReader",
    "WeightSource",
    "load_pretrained",
    "require_experts",
    "save_pretrained",
    "trunk_tensors",
    "write_index",
    "write_json",
    "write_model_config",
    "write_shard",
]
