"""Names of a model's tensors in Hugging Face's DeepSeek-V3 format."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def layer_prefix(layer: int) -> str:
    """Prefix of the names of a layer's tensors; MTP module k is layer num_hidden_layers + k."""
    return f"model.layers.{layer}."


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Names of an expert's gate, up and down projection."""
    gate, up, down = (f"{layer_prefix(layer)}mlp.experts.{expert}.{p}.weight" for p in _PROJECTIONS)
    return gate, up, down


def expert_tensors(layer: int, expert: int, w13: Tensor, w2: Tensor) -> Iterator[tuple[str, Tensor]]:
    """An expert's tensors by name, from w13 [2I, D] and w2 [D, I]; views, not copies."""
    gate, up = w13.chunk(2)
    yield from zip(expert_names(layer, expert), (gate, up, w2), strict=True)


def duplicate_names(config: ModelConfig) -> dict[str, str]:
    """Names under which MTP modules hold the shared embedding and head again: duplicate -> original.

    Released checkpoints contain them, so they are written; reading does not need them.
    """
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    names: dict[str, str] = {}
    for layer in config.mtp_layers:
        if config.mtp_mode == "chain":
            names[layer_prefix(layer) + "embed_tokens.weight"] = EMBEDDING
        names[layer_prefix(layer) + "shared_head.head.weight"] = head
    return names


def empty_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the shared experts of a model without any, which transformers stores as well."""
    if config.n_shared_experts:
        return {}
    hidden = config.hidden_size
    return {
        f"{layer_prefix(layer)}mlp.shared_experts.{name}.weight": (hidden, 0) if last else (0, hidden)
        for layer in config.moe_layers
        for name, last in zip(_PROJECTIONS, (False, False, True), strict=True)
    }


__all__ = [
    "EMBEDDING",
    "HEAD",
    "duplicate_names",
    "empty_shapes",
    "expert_names",
    "expert_tensors",
    "layer_prefix",
]
