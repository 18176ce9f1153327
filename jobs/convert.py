"""`raymoe export` and `raymoe import`: checkpoints to and from plain Hugging Face directories.

Tensors stream one shard at a time, so a model of any size passes through a machine of modest memory.
A directory appears under its name only when it is complete.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import CheckpointError, ConfigError
from jobs.tokenizer import load_tokenizer
from jobs.weights import find_weights
from model.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    ShardReader,
    read_model_config,
    write_json,
    write_shard,
)
from model.config import ModelConfig
from model.transformer import Transformer

_SHARD_BYTES = 2 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_BIAS = "e_score_correction_bias"


def export_checkpoint(checkpoint: Path, target: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write weights, configuration and tokenizer as transformers and vLLM read them.

    Each MTP module gets its own copies of the shared embedding and head, as in DeepSeek's files.

    Args:
        checkpoint: one of ours, or a run's directory, whose latest is taken.
        target: a directory that does not exist, or is empty.
        dtype: cast to; None keeps each tensor's.

    Raises:
        CheckpointError: missing, incomplete, or `target` is taken.
        ConfigError: `dtype` is unknown.
    """
    source = find_weights(checkpoint)
    config = read_model_config(source)
    reader = ShardReader(source)
    shapes = _shapes(config)
    _check_complete(reader, shapes, source)
    stored = {name: name for name in shapes} | _mtp_copies(config)
    return _write(reader, stored, shapes, config, source, target, _dtype(dtype))


def import_checkpoint(source: Path, target: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Check a Hugging Face model of the DeepSeek-V3 architecture and write it as a checkpoint of weights.

    Copies of the embedding and the head in MTP modules are compared with the shared ones and left out.

    Args:
        source: the directory with config.json and safetensors.
        target: a directory that does not exist, or is empty.
        dtype: cast to; None keeps each tensor's.

    Raises:
        CheckpointError: missing, incomplete, of another architecture, or `target` is taken.
        ConfigError: `dtype` is unknown, or config.json asks for what this model does not do.
    """
    config = read_model_config(source)
    reader = ShardReader(source)
    shapes = _shapes(config)
    _check_complete(reader, shapes, source)
    for copy, original in _mtp_copies(config).items():
        if copy in reader and not torch.equal(reader.tensor(copy), reader.tensor(original)):
            raise CheckpointError(
                f"{source}: {copy} differs from {original}; MTP modules with an embedding or head of "
                "their own are not supported"
            )
    return _write(reader, {name: name for name in shapes}, shapes, config, source, target, _dtype(dtype))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, without copies of shared ones."""
    with torch.device("meta"):
        trunk = Transformer(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in trunk.items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (wide, hidden)
            shapes[f"{prefix}.down_proj.weight"] = (hidden, wide)
    return shapes


def _mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that DeepSeek's files repeat for each MTP module, and what they repeat."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return {
        f"model.layers.{layer}.{name}": original
        for layer in config.mtp_layers
        for name, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", head),
        )
    }


def _check_complete(reader: ShardReader, shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    missing = [name for name in shapes if name not in reader]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(shapes)} tensors, the first {missing[0]}; if it was "
            f"saved without its MTP modules, set num_nextn_predict_layers to 0 in its {CONFIG_FILE}"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise ConfigError(f"--dtype {name!r} is unknown; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name] if name is not None else None


def _write(
    reader: ShardReader,
    stored: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Write tensors under the keys of `stored`, each read under its value; returns a summary."""
    main_dtype = dtype or reader.tensor("model.norm.weight").dtype
    shards = list(_shards(stored, shapes, main_dtype.itemsize))
    weight_map: dict[str, str] = {}
    size = 0
    with _appearing(target) as making:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: _read(reader, name, stored[name], shapes, dtype) for name in names}
            write_shard(making / file, tensors)
            weight_map |= dict.fromkeys(names, file)
            size += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(making / INDEX_FILE, index)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, making / name)
        write_json(making / CONFIG_FILE, _hf_config(config, making, main_dtype))
    return {
        "directory": str(target),
        "source": str(source),
        "tensors": len(stored),
        "bytes": size,
        "dtype": str(main_dtype).removeprefix("torch."),
        "parameters": config.total_parameters(),
    }


def _shards(stored: dict[str, str], shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for name, original in stored.items():
        width = math.prod(shapes[original]) * itemsize
        if held and size + width > _SHARD_BYTES:
            yield held
            held, size = [], 0
        held.append(name)
        size += width
    yield held


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.dtype.itemsize == 1:
        raise CheckpointError(f"{name} is {tensor.dtype}: 8-bit weights have to be dequantised first")
    if name.endswith(_BIAS):
        return tensor.float()
    return tensor if dtype is None else tensor.to(dtype)


def _read(
    reader: ShardReader,
    name: str,
    original: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None,
) -> Tensor:
    tensor = _cast(name, reader.tensor(original, shapes[original]), dtype)
    # A copy must not share memory with its original, with which it may lie in one shard.
    return tensor if name == original else tensor.clone()


def _hf_config(config: ModelConfig, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    # Older readers know the second name.
    values = {**config.to_hf(), "dtype": name, "torch_dtype": name}
    if (directory / "tokenizer.json").is_file():
        values["eos_token_id"] = load_tokenizer(directory, config.vocab_size)[1]
    return values


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `target` when all went well and vanishes otherwise."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; give a directory that is new or empty")
    making = target.with_name(f".{target.name}.writing")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        making.replace(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


__all__ = ["export_checkpoint", "import_checkpoint"]
