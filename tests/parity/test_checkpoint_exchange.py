"""Our checkpoints load in transformers, and those of transformers in our model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from model.checkpoints.hf_names import layer_prefix
from model.checkpoints.pretrained import load_pretrained, save_pretrained
from support.reference_models import TOLERANCE, ours, random_tokens, their_modules, theirs, tiny


@pytest.mark.parametrize(
    ("changes", "shard_bytes"),
    [({}, 1 << 30), ({}, 50_000), ({"tie_word_embeddings": True}, 1 << 30), ({"q_lora_rank": None}, 1 << 30)],
    ids=str,
)
def test_ours_in_transformers(tmp_path: Path, changes: dict[str, Any], shard_bytes: int) -> None:
    model = ours(tiny(**changes))
    save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 1 << 30)
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(reference, DeepseekV3ForCausalLM)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    tokens = random_tokens(model.config, 2, 30)
    with torch.no_grad():
        got, expected = reference(input_ids=tokens).logits, model(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shard_size", ["10MB", "60KB"])
def test_transformers_in_ours(tmp_path: Path, shard_size: str) -> None:
    """transformers leaves the number of MTP modules in config.json, but saves none of them."""
    reference = theirs(ours(tiny(), bias=0.5), num_nextn_predict_layers=1)
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    model = load_pretrained(tmp_path)
    assert model.config.num_nextn_predict_layers == 0
    tokens = random_tokens(model.config, 2, 30)
    with torch.no_grad():
        got, expected = model(tokens), reference(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_mtp_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model is as deep as DeepSeek-V3: transformers recognises MTP weights by layer number 61 alone."""
    model = ours(
        tiny(
            num_hidden_layers=61,
            first_k_dense_replace=60,
            num_nextn_predict_layers=1,
            hidden_size=16,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
        )
    )
    save_pretrained(model, tmp_path)
    main, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    with caplog.at_level(logging.WARNING):
        modules = MtpModel.from_pretrained(main)  # raises when a key is missing
    assert "UNEXPECTED" not in caplog.text
    expected = their_modules(model, main)
    tokens = random_tokens(model.config, 1, 8)
    with torch.no_grad():
        hidden = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(3))
        out = [
            m.forward_layer(
                0,
                hidden,
                torch.arange(8).unsqueeze(0),
                MtpCache(config=main.config.get_mtp_config()),
                input_ids=tokens,
            )
            for m in (modules, expected)
        ]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=TOLERANCE)


def test_mtp_round_trip(tmp_path: Path) -> None:
    """A checkpoint with MTP modules loads in our model; transformers ignores the modules' keys alone."""
    model = ours(tiny(num_nextn_predict_layers=2))
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    modules = tuple(layer_prefix(layer) for layer in model.config.mtp_layers)
    assert info["missing_keys"] == set()
    assert info["unexpected_keys"]
    assert all(name.startswith(modules) for name in info["unexpected_keys"])
