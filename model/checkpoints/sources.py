"""Sources of a model's weights: random numbers, or a checkpoint in Hugging Face's format."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import CheckpointError
from model.checkpoints.expected_tensors import copies, layer_of, tensor_shapes, trunk_shapes, unused_tensors
from model.checkpoints.fp8 import SCALE_SUFFIX, block_size, dequantize, is_fp8
from model.checkpoints.hf_config import model_config, read_hf_config
from model.checkpoints.hf_names import EMBEDDING, HEAD, expert_names, layer_prefix
from model.checkpoints.shards import ShardReader
from model.config import ModelConfig
from model.weight_source import WeightSource


def gate_biases(source: WeightSource, config: ModelConfig) -> Tensor:
    """The gates' biases [L, E] float32, rows in the order of `ModelConfig.moe_layers`."""
    names = [f"{layer_prefix(layer)}mlp.gate.e_score_correction_bias" for layer in config.moe_layers]
    biases = {name: tensor for name, tensor in source.trunk_tensors() if name in names}
    return torch.stack([biases[name] for name in names])


class RandomSource:
    """Weights at the start of training: matrices from N(0, initializer_range), norms one, biases zero.

    Every tensor has a random stream of its own, seeded by its name and drawn in float32, so that neither
    placement nor dtype changes the model.
    """

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.seed, self.dtype = config, seed, dtype

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        hidden, wide = self.config.hidden_size, self.config.moe_intermediate_size
        gate, up, down = expert_names(layer, expert)
        w13 = torch.cat((self._draw(gate, (wide, hidden)), self._draw(up, (wide, hidden))))
        return w13, self._draw(down, (hidden, wide))

    def trunk(self) -> dict[str, Tensor]:
        return _with_head(self.config, dict(self.trunk_tensors()))

    def trunk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in _apart(self.config):
            if name.endswith("e_score_correction_bias"):
                yield name, torch.zeros(shape, dtype=torch.float32)
            elif name.endswith("norm.weight"):
                yield name, torch.ones(shape, dtype=self.dtype)
            else:
                yield name, self._draw(name, shape)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return (torch.randn(shape, generator=generator) * self.config.initializer_range).to(self.dtype)


class PretrainedSource:
    """A checkpoint in Hugging Face's DeepSeek-V3 format, of which only the requested tensors are read.

    Weights quantised to fp8 in blocks are dequantised. Reading a tensor that is missing, damaged or of
    another shape raises a CheckpointError.

    Attributes:
        unused: Names of the checkpoint's tensors that the model does not use, as further MTP modules.

    Args:
        directory: Directory with config.json and safetensors files.
        config: Shape that the checkpoint must have; None takes that of its config.json.
        dtype: Type to convert weights to; None keeps their own (float32 for fp8). Biases are always float32.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of another architecture; or it has tensors
            without which a model computes something else.
    """

    def __init__(
        self,
        directory: Path | str,
        config: ModelConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.directory, self.dtype = Path(directory), dtype
        values = read_hf_config(self.directory)
        self._block = block_size(values)
        self._reader = ShardReader(self.directory)
        self.config = config or self._own_config(values)
        self.unused = unused_tensors(self._reader, self.config)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        hidden, wide = self.config.hidden_size, self.config.moe_intermediate_size
        gate, up, down = expert_names(layer, expert)
        w13 = torch.cat((self.tensor(gate, (wide, hidden)), self.tensor(up, (wide, hidden))))
        return w13, self.tensor(down, (hidden, wide))

    def trunk(self) -> dict[str, Tensor]:
        return _with_head(self.config, dict(self.trunk_tensors()))

    def trunk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        shapes = dict(_apart(self.config))
        for copy, original in copies(self.config).items():
            if copy in self._reader:
                self.check_copy(copy, original, shapes[original])
        for name, shape in shapes.items():
            yield name, self.tensor(name, shape)

    def check(self) -> None:
        """Check names and shapes of all tensors against the configuration, from the files' headers alone.

        Raises:
            CheckpointError: A tensor is missing, or of another shape.
        """
        for name, shape in tensor_shapes(self.config).items():
            self._reader.check(name, shape)

    def check_copy(self, copy: str, original: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor that repeats the embedding or the head has the same values.

        Raises:
            CheckpointError: It has other values.
        """
        if torch.equal(self.tensor(copy, shape), self.tensor(original, shape)):
            return
        if copy == HEAD:
            raise CheckpointError(
                f"{self.directory}: {copy} differs from {original}, although tie_word_embeddings is true; "
                "set it to false in config.json"
            )
        raise CheckpointError(
            f"{self.directory}: {copy} differs from {original}; MTP modules with an embedding or head "
            "of their own are not supported"
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, dequantised and converted; a missing one of no elements is empty.

        Raises:
            CheckpointError: The tensor is missing, damaged, of another shape, or of no weight's dtype.
        """
        if 0 in shape and name not in self._reader:
            return torch.empty(shape, dtype=self.dtype or torch.float32)
        tensor = self._reader.tensor(name, shape=shape)
        scales = name + SCALE_SUFFIX
        if is_fp8(tensor.dtype):
            if scales not in self._reader:
                raise CheckpointError(
                    f"{self.directory}: {name} is fp8 but {scales} is missing; the checkpoint is incomplete"
                )
            blocks = tuple(-(-n // b) for n, b in zip(shape, self._block, strict=True))
            tensor = dequantize(tensor, self._reader.tensor(scales, shape=blocks), self._block)
        elif scales in self._reader or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            beside = f" beside {scales}" if scales in self._reader else ""
            raise CheckpointError(
                f"{self.directory}: {name} is {kind}{beside}; weights are fp8 with scales, or floats "
                "without: give another export of the model"
            )
        if name.endswith("e_score_correction_bias"):
            return tensor.float()
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def _own_config(self, values: dict[str, Any]) -> ModelConfig:
        config = model_config(self.directory, values)
        # When it saves a model, transformers drops the MTP modules and leaves their number in config.json.
        first = config.num_hidden_layers
        last = first + config.num_nextn_predict_layers
        if not any(first <= layer_of(name) < last for name in self._reader.names):
            return config.model_copy(update={"num_nextn_predict_layers": 0})
        return config


def _apart(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the trunk's tensors, without a tied head."""
    for name, shape in trunk_shapes(config).items():
        if name != HEAD or not config.tie_word_embeddings:
            yield name, shape


def _with_head(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    return tensors


__all__ = ["PretrainedSource", "RandomSource", "gate_biases"]
