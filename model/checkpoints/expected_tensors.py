"""Tensors that a checkpoint of a given configuration holds, and what to make of all others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from errors import CheckpointError, shown
from model.checkpoints.fp8 import SCALE_SUFFIX, is_fp8
from model.checkpoints.hf_names import (
    EMBEDDING,
    HEAD,
    duplicate_names,
    empty_shapes,
    expert_names,
    layer_prefix,
)
from model.checkpoints.meta_device import meta_device
from model.checkpoints.shards import ShardReader
from model.config import ModelConfig
from model.transformer import Transformer

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_BUFFER = ".rotary_emb.inv_freq"  # saved by older versions of transformers, and computed from config.json
_NAMED = 4  # names that a description lists before it counts the rest


def trunk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trunk's parameters and buffers."""
    with meta_device():
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model needs, without a tied head and without duplicates."""
    shapes = trunk_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    hidden, wide = config.hidden_size, config.moe_intermediate_size
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            gate, up, down = expert_names(layer, expert)
            shapes |= {gate: (wide, hidden), up: (wide, hidden), down: (hidden, wide)}
    return shapes


def copies(config: ModelConfig) -> dict[str, str]:
    """Names under which a checkpoint may hold the embedding or the head again: copy -> original."""
    tied = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    return tied | duplicate_names(config)


def layer_of(name: str) -> int:
    """Index of the layer that a tensor belongs to by its name; -1 if it belongs to none."""
    layer = _LAYER.match(name)
    return -1 if layer is None else int(layer[1])


def unused_tensors(reader: ShardReader, config: ModelConfig) -> tuple[str, ...]:
    """Names of the tensors that the model does not use, and without which it computes the same.

    These are the layers and MTP modules beyond those of config.json, and buffers that it recomputes.

    Raises:
        CheckpointError: A tensor belongs to a model that computes something else.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    routed = (layers - config.first_k_dense_replace) * config.n_routed_experts
    if max(layers, routed) > len(reader.names):  # before names are made for all of them
        raise CheckpointError(
            f"{reader.path} has {len(reader.names)} tensors, too few for the {layers} layers and {routed} "
            "routed experts of its config.json; the checkpoint is incomplete, or the file is another model's"
        )
    expected = tensor_shapes(config).keys() | copies(config).keys()
    unused: list[str] = []
    foreign: list[str] = []
    empty = empty_shapes(config)
    for name in reader.names:
        if name in empty and 0 in reader.shape(name):
            continue
        if name in expected or name.removesuffix(SCALE_SUFFIX) in expected:
            continue
        (unused if layer_of(name) >= layers or name.endswith(_BUFFER) else foreign).append(name)
    if foreign:
        raise CheckpointError(
            f"{reader.path} has tensors that this model does not use, and without which it would compute "
            f"something else: {_some(foreign)}; give a checkpoint of the DeepSeek-V3 architecture, or "
            "remove them"
        )
    return tuple(unused)


def stored_dtype(reader: ShardReader) -> torch.dtype:
    """The dtype of most of a trunk's weights; where they are fp8, that of the weights that are not.

    Raises:
        CheckpointError: The checkpoint has no weights, or is damaged.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in reader.names:
        if name.endswith(".weight") and ".mlp.experts." not in name:
            dtype = reader.dtype(name)
            sizes[dtype] += 0 if is_fp8(dtype) else reader.nbytes(name)
    if not sizes:
        raise CheckpointError(
            f"{reader.path} has no weights; give a checkpoint of the DeepSeek-V3 architecture"
        )
    return sizes.most_common(1)[0][0]


def described(names: Collection[str]) -> str:
    """A few words that name tensors: a whole layer as one entry, with the number of its tensors."""
    layers: Counter[str] = Counter()
    for name in names:
        layer = layer_of(name)
        layers[name if layer < 0 else layer_prefix(layer) + "*"] += 1
    entries = []
    for entry, count in layers.items():
        if count == 1 and entry.endswith("*"):
            entry = next(name for name in names if name.startswith(entry[:-1]))
        entries.append(entry if count == 1 else f"{entry} ({count})")
    return _some(entries)


def _some(entries: Sequence[str]) -> str:
    """The first entries of a list, and the number of the others."""
    more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return ", ".join(map(shown, entries[:_NAMED])) + more


__all__ = [
    "copies",
    "described",
    "layer_of",
    "stored_dtype",
    "tensor_shapes",
    "trunk_shapes",
    "unused_tensors",
]
