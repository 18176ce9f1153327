"""A run with a corpus and one checkpoint, whose weights are random."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from jobs.checkpoints.checkpoint_store import TrainingState
from jobs.config.presets import preset
from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from model.checkpoints.pretrained import RandomSource, write_index, write_model_config, write_shard

CONFIG = preset("tiny")
TEXTS = [f"def name_{i}(argument):\n    return argument + {i}\n" for i in range(40)]


def write_random_run(directory: Path) -> Path:
    """Make a directory that of a run: a corpus, and a checkpoint with a tokenizer. Returns the directory."""
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    checkpoint = directory / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    source = RandomSource(CONFIG.model, seed=1)
    trunk = source.trunk()
    for layer in CONFIG.model.moe_layers:
        # Biases that turn choices, so that losing one shows.
        trunk[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.linspace(-0.3, 0.3, 8)
        experts = {}
        for expert in range(CONFIG.model.n_routed_experts):
            w13, w2 = source.expert(layer, expert)
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up = w13.chunk(2)
            experts |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
            experts[f"{prefix}.down_proj.weight"] = w2
        write_shard(checkpoint / f"model-experts-{layer}.safetensors", experts)
    write_shard(checkpoint / "model-trunk.safetensors", trunk)
    write_shard(checkpoint / "optimizer-trunk.safetensors", {"moment": torch.zeros(2)})
    write_index(checkpoint)
    write_model_config(checkpoint, CONFIG.model)
    save_tokenizer(*train_tokenizer(TEXTS, 300), checkpoint)
    values = CONFIG.to_dict()
    values["data"] |= {"path": str(corpus), "validation_fraction": 0.2}
    state = TrainingState(step=5, bias_version=5, config=values)
    (checkpoint / "state.json").write_text(
        json.dumps({"format": 1, "step": state.step, "bias_version": state.bias_version, "config": values})
    )
    return directory


__all__ = ["CONFIG", "TEXTS", "write_random_run"]
