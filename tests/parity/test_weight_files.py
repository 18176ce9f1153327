"""Which of a directory's files and tensors are read, and which are refused: as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from errors import CheckpointError
from model.causal_lm import CausalLM
from model.checkpoints.pretrained import PretrainedSource, load_pretrained, save_pretrained, write_index
from support.reference_models import TOLERANCE, ours, random_tokens, tiny

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@torch.no_grad()
def assert_as_in_transformers(directory: Path) -> CausalLM:
    model = load_pretrained(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    tokens = random_tokens(model.config, 1, 9)
    torch.testing.assert_close(model(tokens), reference(input_ids=tokens).logits, rtol=0, atol=TOLERANCE)
    return model


def head(model: CausalLM) -> Tensor:
    return model.trunk.lm_head.weight


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    one, other = ours(tiny(), seed=1), ours(tiny(), seed=2)
    save_pretrained(one, tmp_path, shard_bytes=50_000)
    save_pretrained(other, tmp_path / "other")
    (tmp_path / "other").joinpath("model-00001-of-00001.safetensors").rename(tmp_path / SINGLE)
    assert (tmp_path / INDEX).exists()
    assert torch.equal(head(assert_as_in_transformers(tmp_path)), head(other))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_saving_replaces_the_model_that_is_there(tmp_path: Path, shard_bytes: int) -> None:
    """transformers reads what was written, whatever files another program had left there."""
    old, new = ours(tiny(), seed=1), ours(tiny(), seed=2)
    save_pretrained(old, tmp_path, shard_bytes=20_000)
    (tmp_path / SINGLE).write_bytes(next(tmp_path.glob("*.safetensors")).read_bytes())
    save_pretrained(new, tmp_path, shard_bytes=shard_bytes)
    named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named
    assert torch.equal(head(assert_as_in_transformers(tmp_path)), head(new))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    write_index(directory, [file.name])


def set_key(directory: Path, **keys: object) -> None:
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def test_a_head_beside_a_tied_embedding_is_a_copy_or_refused(tmp_path: Path) -> None:
    save_pretrained(ours(tiny(tie_word_embeddings=True)), tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_as_in_transformers(tmp_path)
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1.0))
    with pytest.raises(
        CheckpointError, match=r"lm_head.*differs from .*tie_word_embeddings.*set it to false"
    ):
        load_pretrained(tmp_path)
    set_key(tmp_path, tie_word_embeddings=False)
    assert not torch.equal(head(assert_as_in_transformers(tmp_path)), torch.zeros(1))


MODULE = "model.layers.3."


@pytest.mark.parametrize(
    "keys",
    [{}, {"num_nextn_predict_layers": ...}, {"num_nextn_predict_layers": ..., "num_mtp_layers": 1}],
    ids=str,
)
def test_modules_are_read_without_their_key(tmp_path: Path, keys: dict[str, object]) -> None:
    """transformers takes one module where config.json does not say how many there are."""
    model = ours(tiny(num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path)
    set_key(tmp_path, **keys)
    back = load_pretrained(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_tensors_without_effect_are_named(tmp_path: Path) -> None:
    save_pretrained(ours(tiny(num_nextn_predict_layers=2)), tmp_path)
    assert PretrainedSource(tmp_path).unused == ()
    set_key(tmp_path, num_nextn_predict_layers=1)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda t: t.update({buffer: torch.ones(4)}))
    unused = PretrainedSource(tmp_path).unused
    assert buffer in unused
    assert {name for name in unused if name != buffer} == {
        name for name in load_file(next(tmp_path.glob("*.safetensors"))) if name.startswith("model.layers.4.")
    }
    assert load_pretrained(tmp_path).config.num_nextn_predict_layers == 1


O_PROJ = "model.layers.0.self_attn.o_proj."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({O_PROJ + "bias": torch.ones(32)}),
            r"does not use.*layers\.0\.self_attn\.o_proj\.bias",
        ),
        (lambda t: t.update({"lm_head.bias": torch.ones(96)}), r"does not use.*lm_head\.bias"),
        (
            lambda t: t.update({f"model.layers.0.mlp.{p}_proj.bias": torch.ones(1) for p in "abcdef"}),
            r"a_proj\.bias, .*b_proj\.bias, .*c_proj\.bias, .*d_proj\.bias and 2 more;",
        ),
        (lambda t: t.update({"model.layers.1.self_attn.indexer.wk.weight": torch.ones(2, 32)}), "indexer"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.16.up_proj.weight": torch.ones(24, 32)}),
            r"experts\.16",
        ),
        (
            lambda t: t.update({O_PROJ + "weight_scale_inv": torch.ones(1, 1)}),
            r"o_proj\.weight is float32 beside",
        ),
        (
            lambda t: t.update({O_PROJ + "weight": t[O_PROJ + "weight"].to(torch.int8)}),
            r"o_proj\.weight is int8;",
        ),
        (
            lambda t: t.update({O_PROJ + "weight": t[O_PROJ + "weight"].to(torch.int32)}),
            r"o_proj\.weight is int32;",
        ),
        (lambda t: t[MODULE + "embed_tokens.weight"].add_(1.0), r"embed_tokens\.weight differs from"),
        (
            lambda t: t[MODULE + "shared_head.head.weight"].add_(1.0),
            r"head\.weight differs from lm_head\.weight",
        ),
    ],
)
def test_tensors_that_would_change_the_function_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    save_pretrained(ours(tiny(num_nextn_predict_layers=1)), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=said) as refused:
        load_pretrained(tmp_path)
    assert "\n" not in str(refused.value)
