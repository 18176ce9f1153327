"""Weights on disk in Hugging Face's DeepSeek-V3 format, and where a model's parts get theirs from.

    config.json                       the model's shape
    *.safetensors                     shards; every expert's matrices are tensors of their own
    model.safetensors.index.json      which shard holds which tensor

Readers fetch one tensor at a time, so an expert host reads its own experts and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import CheckpointError
from model.config import ModelConfig
from model.transformer import Transformer

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


class WeightSource(Protocol):
    """Where trunk and expert hosts get their weights."""

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """w13 [2I, D] (gate_proj above up_proj) and w2 [D, I] of one expert."""
        ...

    def trunk(self) -> dict[str, Tensor]:
        """Everything but the routed experts, by the names of `Transformer.state_dict`."""
        ...

    def bias(self) -> list[Tensor]:
        """The gates' biases [E] float32, in the order of `ModelConfig.moe_layers`."""
        ...


class RandomSource:
    """Fresh weights, each tensor seeded by its place: any placement of the experts gives the same model."""

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._config, self._seed, self._dtype = config, seed, dtype

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """See `WeightSource.expert`."""
        hidden, wide = self._config.hidden_size, self._config.moe_intermediate_size
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        return self._draw(f"{name}.w13", (2 * wide, hidden)), self._draw(f"{name}.w2", (hidden, wide))

    def trunk(self) -> dict[str, Tensor]:
        """See `WeightSource.trunk`."""
        with torch.device("meta"):
            model = Transformer(self._config)
        weights: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                weights[name] = torch.zeros(tensor.shape, dtype=torch.float32)
            elif name.endswith("norm.weight"):
                weights[name] = torch.ones(tensor.shape, dtype=self._dtype)
            else:
                weights[name] = self._draw(name, tuple(tensor.shape))
        if self._config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        return weights

    def bias(self) -> list[Tensor]:
        """See `WeightSource.bias`."""
        return [torch.zeros(self._config.n_routed_experts) for _ in self._config.moe_layers]

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed << 32) ^ zlib.crc32(name.encode()))
        # Drawn in float32 whatever the dtype, so that dtypes differ by rounding alone.
        drawn = torch.empty(shape).normal_(0.0, self._config.initializer_range, generator=generator)
        return drawn.to(self._dtype)


class ShardReader:
    """Tensors by name out of one safetensors file, or out of all that an index lists."""

    def __init__(self, path: Path) -> None:
        """`path` is a file or a directory with an index or a single `model.safetensors`.

        Raises:
            CheckpointError: missing or damaged.
        """
        self._path = path
        self._open: dict[Path, Any] = {}
        if path.is_dir():
            self._files = self._index(path)
        else:
            self._files = dict.fromkeys(self._file(path).keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._files)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: missing, cut off, or of another shape than `shape`.
        """
        if name not in self._files:
            raise CheckpointError(f"{self._path} has no tensor {name}; it is incomplete, or of another model")
        file = self._files[name]
        try:
            tensor: Tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {name} cannot be read ({error}); copy the file again") from None
        if shape is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file}: {name} is {list(tensor.shape)}, the configuration asks for {list(shape)}"
            )
        return tensor

    def _index(self, directory: Path) -> dict[str, Path]:
        index = directory / INDEX_FILE
        if index.is_file():
            values = read_json(index)
            weights = values.get("weight_map")
            if not isinstance(weights, dict):
                raise CheckpointError(f"{index} has no weight_map; copy the file again")
            return {str(name): directory / str(file) for name, file in weights.items()}
        single = directory / _SINGLE_FILE
        if not single.is_file():
            raise CheckpointError(f"{directory} holds neither {INDEX_FILE} nor {_SINGLE_FILE}")
        return dict.fromkeys(self._file(single).keys(), single)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); copy the file again") from None
        return self._open[path]


class PretrainedSource:
    """Weights of a directory in Hugging Face's format, one tensor at a time.

    Args:
        directory: of the weights.
        config: what the weights must fit; None takes the directory's own.

    Raises:
        CheckpointError: missing, damaged, or of another architecture.
    """

    def __init__(self, directory: Path, config: ModelConfig | None = None) -> None:
        self.config = config or read_model_config(directory)
        self._reader = ShardReader(directory)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """See `WeightSource.expert`."""
        hidden, wide = self.config.hidden_size, self.config.moe_intermediate_size
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up = (self._reader.tensor(f"{name}.{p}_proj.weight", (wide, hidden)) for p in ("gate", "up"))
        return torch.cat((gate, up)), self._reader.tensor(f"{name}.down_proj.weight", (hidden, wide))

    def trunk(self) -> dict[str, Tensor]:
        """See `WeightSource.trunk`."""
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in Transformer(self.config).state_dict().items()}
        weights: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            stored = name
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                stored = "model.embed_tokens.weight"
            tensor = self._reader.tensor(stored, shape)
            weights[name] = tensor.float() if name.endswith("e_score_correction_bias") else tensor
        return weights

    def bias(self) -> list[Tensor]:
        """See `WeightSource.bias`."""
        shape = (self.config.n_routed_experts,)
        names = (f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in self.config.moe_layers)
        return [self._reader.tensor(name, shape).float() for name in names]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all."""
    making = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, making, {"format": "pt"})
    os.replace(making, path)


def write_index(directory: Path) -> None:
    """Write the index of all `model*.safetensors` of a directory."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight_map[name] = path.name
                shape = file.get_slice(name).get_shape()
                total += math.prod(shape) * _WIDTH[file.get_slice(name).get_dtype()]
    values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, values)


_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "U8": 1}


def read_model_config(directory: Path) -> ModelConfig:
    """The shape of the model in a directory."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give one with config.json and safetensors")
    return ModelConfig.from_hf(read_json(directory / CONFIG_FILE))


def write_model_config(directory: Path, config: ModelConfig) -> None:
    """Write config.json as transformers reads it."""
    write_json(directory / CONFIG_FILE, config.to_hf())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` when it is not there or none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy the file again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    making = path.with_name(f".{path.name}.tmp")
    making.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(making, path)


__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "PretrainedSource",
    "RandomSource",
    "ShardReader",
    "WeightSource",
    "read_json",
    "read_model_config",
    "write_index",
    "write_json",
    "write_model_config",
    "write_shard",
]
