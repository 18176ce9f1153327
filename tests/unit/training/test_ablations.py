"""Every balance strategy and MTP mode trains, with equal results for experts in process and on hosts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from support.training_job import RunOutcome, difference, text_corpus, tiny, train

pytestmark = pytest.mark.slow

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "auxiliary": {"balance": {"strategy": "auxiliary"}},
    "device": {"balance": {"strategy": "device"}},
    "none": {"balance": {"strategy": "none", "sequence_weight": 0.0}},
    "schedules": {
        "balance": {"update_rate": [{"step": 0, "value": 0.001}, {"step": 3, "value": 0.0}]},
        "mtp": {"weight": [{"step": 0, "value": 0.3}, {"step": 3, "value": 0.1}]},
    },
    "mtp-parallel": {"model": {"mtp_mode": "parallel", "num_nextn_predict_layers": 2}},
    "mtp-chain-of-two": {"model": {"num_nextn_predict_layers": 2}},
    "mtp-off": {"model": {"num_nextn_predict_layers": 0}},
    "no-q-lora": {"model": {"q_lora_rank": None}},
    "tied": {"model": {"tie_word_embeddings": True}},
    "accumulation": {"training": {"microbatch_size": 1}},
}


def run(variant: str, hosts: int, output: Path) -> RunOutcome:
    sections = {name: dict(fields) for name, fields in VARIANTS[variant].items()}
    sections["training"] = {
        **{"dtype": "float64", "steps": 6, "batch_size": 4, "eval_interval": 3, "tensorboard": False},
        **sections.get("training", {}),
    }
    sections["checkpoint"] = {"interval": 0}
    sections["cluster"] = {"expert_hosts": hosts}
    config = tiny(**sections)
    return train(config, text_corpus(config, TEXT), output, channel="shm" if hosts else "local")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_trains_alike_near_and_far(variant: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    near, far = run(variant, 0, tmp_path / "near"), run(variant, 2, tmp_path / "far")
    losses, weights, bias = difference(far, near)
    assert losses <= 1e-9
    assert weights <= 1e-8
    assert bias == 0.0
    moved = any(bool(t.any()) for name, t in near.trunk.items() if name.endswith("e_score_correction_bias"))
    assert moved == (variant not in ("auxiliary", "device", "none"))
    assert near.losses[-1] < near.losses[0]
    has_mtp = variant != "mtp-off"
    assert all((line["mtp_loss"] > 0) == has_mtp for line in near.metrics)
    assert "validation_loss" in near.metrics[-1]
