"""transformers computes the same model from what `raymoe export` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.checkpoints.loaded_model import load_model
from jobs.config.config_file import load_config
from jobs.data.tokenizer import save_tokenizer, train_tokenizer
from jobs.tools.convert import export_checkpoint, import_checkpoint
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import RandomSource, save_pretrained

transformers = pytest.importorskip("transformers")
# With four experts of two groups alone, transformers scores groups as the paper does.
CONFIG = load_config(
    preset_name="tiny", overrides=["model.n_routed_experts=16", "model.num_experts_per_tok=4"]
).model
TOKENS = torch.arange(80).view(2, 40) * 7 % CONFIG.vocab_size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    model = CausalLM(CONFIG)
    model.load(RandomSource(CONFIG, seed=3))
    # Weights large enough to spread the scores, and biases that turn choices.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    spread = torch.linspace(-0.2, 0.2, CONFIG.n_routed_experts)
    model.trunk.set_bias(spread.expand(len(CONFIG.moe_layers), -1))
    save_pretrained(model, directory)
    save_tokenizer(*train_tokenizer(["some text to learn from"] * 9, CONFIG.vocab_size), directory)
    return directory


@torch.no_grad()
def test_transformers_computes_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    assert "note" not in export_checkpoint(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = load_model(checkpoint)
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(ours.transformer(TOKENS, experts=ours.experts), expected, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id == ours.text.end_of_text


@torch.no_grad()
def test_a_model_that_transformers_saved_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    import_checkpoint(tmp_path / "saved", tmp_path / "back")
    ours = load_model(tmp_path / "back")
    assert ours.transformer.config.num_nextn_predict_layers == 0  # transformers does not keep the modules
    torch.testing.assert_close(
        ours.transformer(TOKENS, experts=ours.experts), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4
    )
