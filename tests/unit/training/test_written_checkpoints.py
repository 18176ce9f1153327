"""What a run's checkpoint says of its weights is true, for every dtype and for unusual shapes of models."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import CheckpointError
from jobs.checkpoints.checkpoint_store import find_checkpoint
from jobs.checkpoints.loaded_model import compute_dtype
from jobs.training.train import _start
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import load_pretrained, save_pretrained
from model.checkpoints.shards import INDEX, ShardReader
from support.training_job import text_corpus, tiny, train

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "attention_factor": 1.5}
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("dtype", "stored", "hosts", "model"),
    [
        ("float32", torch.float32, 0, {"tie_word_embeddings": True}),
        ("float64", torch.float64, 2, {"n_shared_experts": 0, "group_score_experts": 2}),
        ("float64", torch.float64, 0, {"first_k_dense_replace": 2}),  # the MTP module alone has experts
        ("bfloat16", torch.float32, 1, {"n_shared_experts": 0}),
    ],
)
def test_dtype_and_size(
    dtype: str, stored: torch.dtype, hosts: int, model: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny(
        model=model,
        training={"dtype": dtype, "steps": 2, "eval_interval": 0, "tensorboard": False},
        checkpoint={"interval": 2},
        cluster={"expert_hosts": hosts},
    )
    outcome = train(config, text_corpus(config, TEXT), tmp_path)
    checkpoint = find_checkpoint(tmp_path)
    reader = ShardReader(checkpoint)
    tensors = {name: reader.tensor(name) for name in reader.names}
    index = json.loads((checkpoint / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    weights = {name: t for name, t in tensors.items() if not name.endswith("e_score_correction_bias")}
    assert {tensor.dtype for tensor in weights.values()} == {stored}
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == str(stored).split(".")[1]
    assert compute_dtype(checkpoint) == stored
    back = load_pretrained(checkpoint, dtype=stored)
    assert back.config == config.model
    if dtype != "bfloat16":  # whose trunk in use is rounded
        state = back.trunk.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in outcome.trunk.items())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, None),
        ({"group_score": ..., "group_score_experts": ...}, r"model\.group_score_experts \(1, there 2\)"),
        ({"group_score_experts": 2}, r"model\.group_score_experts \(1, there 2\)"),
        ({"num_nextn_predict_layers": 0}, r"model\.num_nextn_predict_layers \(1, there 0\)"),
        (
            {"rope_scaling": YARN},
            r"model\.rope_scaling \(None, there .*'attention_factor': 1\.5",
        ),
        ({"num_nextn_predict_layers": ...}, None),
    ],
    ids=str,
)
def test_init_names_what_differs(keys: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    """A checkpoint that leaves out what is a default in transformers has that default."""
    config = tiny()
    save_pretrained(CausalLM(config.model), tmp_path / "weights")
    file = tmp_path / "weights" / "config.json"
    values = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    (tmp_path / "weights" / "tokenizer.json").touch()
    with nullcontext() if said is None else pytest.raises(CheckpointError, match=said):
        _start(config, tmp_path / "run", resume=False, init=tmp_path / "weights")
