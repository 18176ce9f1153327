"""A trained model in one process: found, loaded with its experts and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from jobs.checkpoint_store import find_checkpoint
from jobs.precision import computes_bfloat16
from jobs.tokenizer import load_tokenizer
from model.checkpoint import CONFIG_FILE, PretrainedSource
from model.experts import LocalExperts
from model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model to run on its own.

    Attributes:
        directory: what it was loaded from.
        transformer: trunk, its configuration in `.config`.
        experts: all routed experts.
        tokenizer: beside the weights.
        end_of_text: id of the token that ends a text.
    """

    directory: Path
    transformer: Transformer
    experts: LocalExperts
    tokenizer: Tokenizer
    end_of_text: int


def find_weights(path: Path) -> Path:
    """The directory with weights that a user means: itself, or the latest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    return path if (path / CONFIG_FILE).is_file() else find_checkpoint(path)


@torch.no_grad()
def load_model(path: Path) -> LoadedModel:
    """Load a checkpoint, a run's latest, or a Hugging Face directory, for evaluation.

    Weights keep their dtype where the machine computes in it, and become float32 elsewhere.

    Raises:
        CheckpointError: missing, damaged or of another architecture.
        DataError: no tokenizer.json beside the weights.
    """
    directory = find_weights(path)
    source = PretrainedSource(directory)
    config = source.config
    tokenizer, end_of_text = load_tokenizer(directory, config.vocab_size)
    trunk = source.trunk()
    dtype = trunk["model.embed_tokens.weight"].dtype
    if dtype not in (torch.float32, torch.float64) and not (dtype == torch.bfloat16 and computes_bfloat16()):
        dtype = torch.float32
    with torch.device("meta"):
        transformer = Transformer(config)
        experts = LocalExperts(
            config.moe_layers,
            n_experts=config.n_routed_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
        )
    biases = {name: weight.float() for name, weight in trunk.items() if name.endswith("correction_bias")}
    weights = {name: weight.to(dtype) for name, weight in trunk.items()}
    transformer.load_state_dict({**weights, **biases}, assign=True)
    experts = experts.to(dtype).to_empty(device="cpu")
    for layer in config.moe_layers:
        w13, w2 = experts.weights(layer)
        for expert in range(config.n_routed_experts):
            gate_up, down = source.expert(layer, expert)
            w13[expert].copy_(gate_up)
            w2[expert].copy_(down)
    return LoadedModel(
        directory=directory,
        transformer=transformer.eval(),
        experts=experts.eval(),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
    )


__all__ = ["LoadedModel", "find_weights", "load_model"]
