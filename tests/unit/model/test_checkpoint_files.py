"""Checkpoints: fp8 weights, and the errors for a damaged or foreign directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import CheckpointError
from model import load_pretrained, save_pretrained
from model.causal_lm import CausalLM
from model.checkpoints.expected_tensors import stored_dtype
from model.checkpoints.fp8 import dequantize, quantize
from model.checkpoints.shards import ShardReader, write_index, write_shard
from model.checkpoints.sources import PretrainedSource
from model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=20,
    intermediate_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
)
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_pretrained(CausalLM(CONFIG), tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Replace the shard by one with changed tensors."""
    reader = ShardReader(directory)
    tensors = {name: reader.tensor(name).clone() for name in reader.names}
    change(tensors)
    (shard,) = directory.glob("*.safetensors")
    write_shard(shard, tensors)
    write_index(directory)


def to_fp8(directory: Path, block: tuple[int, int] | None) -> dict[str, Tensor]:
    """Quantise all matrices of the blocks as DeepSeek does; return the values that they represent."""
    exact: dict[str, Tensor] = {}
    size = block or (128, 128)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight") or "kv_a_proj" in n]:
            weight, scale = quantize(tensors[name], size)
            assert weight.dtype == torch.float8_e4m3fn
            tensors[name], tensors[name + "_scale_inv"] = weight, scale
            whole = torch.empty(weight.shape)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    at = (slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
                    whole[at] = weight[at].float() * scale[i, j]
            exact[name] = whole

    rewrite(directory, change)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3"}
    if block:
        config["quantization_config"]["weight_block_size"] = list(block)
    (directory / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize("block", [None, (8, 16), (5, 3)])
def test_fp8_is_dequantised_block_by_block(saved: Path, block: tuple[int, int] | None) -> None:
    before = load_pretrained(saved)(TOKENS)
    exact = to_fp8(saved, block)
    assert UP in exact
    source = PretrainedSource(saved)
    w13, w2 = source.expert(1, 3)
    prefix = UP.removesuffix("up_proj.weight")
    assert torch.equal(w13, torch.cat((exact[prefix + "gate_proj.weight"], exact[UP])))
    assert torch.equal(w2, exact[prefix + "down_proj.weight"])
    trunk = source.trunk()
    for name in trunk.keys() & exact.keys():
        assert torch.equal(trunk[name], exact[name]), name
    after = load_pretrained(saved)(TOKENS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.02)


def test_fp8_keeps_its_precision_in_every_block() -> None:
    """Each block has its own scale: a large value costs precision in its block alone."""
    weight = torch.full((8, 8), 1e-4)
    weight[0, 0] = 400.0
    back = dequantize(*quantize(weight, (4, 4)), (4, 4))
    assert torch.equal(back[:4, :4].abs() > 0, weight[:4, :4] > 1)
    torch.testing.assert_close(back[4:], weight[4:], rtol=2**-4, atol=0)


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda tensors: (change(tensors), None)[1])


def _cut(directory: Path) -> None:
    (shard,) = directory.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])


def _fp8_without_scales(directory: Path) -> None:
    to_fp8(directory, None)
    rewrite(directory, lambda tensors: tensors.pop(UP + "_scale_inv") and None)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "config.json").unlink(), r"has no config\.json.*give"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read.*copy it again"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json cannot .*it holds no JSON object"),
        (lambda d: (d / "config.json").write_text("[" * 9999), r"config\.json cannot be read.*copy it again"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), r"safetensors is missing.*copy"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), r"has neither model\.safetensors\.index"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"index\.json is damaged"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[" * 99_999),
         r"index\.json cannot be read .*64 deep.*copy it again"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
         r"index\.json is damaged: weight_map does not map each tensor to a file"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'), r"weight_map does"),
        (_config(rope_scaling="yarn"), r"rope_scaling is 'yarn'; write a mapping"),
        (_config(rope_parameters=3), r"rope_parameters is 3; write a mapping"),
        (_config(rope_scaling={"type": ["yarn"]}), r"of type \[\['yarn'\]\] is not supported"),
        (_config(quantization_config=5), r"quantization_config is 5, which is no mapping; leave it out"),
        (_config(quantization_config={"quant_method": "fp8", "weight_block_size": ["a", 0]}),
         r"weight_block_size \['a', 0\].*give another export"),
        (_cut, r"safetensors is damaged.*copy it again"),
        (_config(model_type="llama"), r"model_type is 'llama'.*DeepSeek-V3"),
        (_config(n_group=3), r"config\.json: n_routed_experts \(4\) must be a multiple of n_group \(3\)"),
        (_config(quantization_config={"quant_method": "awq"}), r"quant_method 'awq'.*give another export"),
        (_config(num_hidden_layers=1024), r"too few for the 1024 layers.*incomplete"),
        (_config(num_nextn_predict_layers=1024), r"too few for the 1026 layers"),
        (_config(n_routed_experts=1 << 16, n_group=1, topk_group=1), r"too few for .* routed experts"),
        (_config(num_hidden_layers=1025), r"num_hidden_layers: .* less than or equal to 1024"),
        (_config(num_nextn_predict_layers=1025), r"num_nextn_predict_layers: .* less than or equal to 1024"),
        (_config(n_routed_experts=65537), r"n_routed_experts: .* less than or equal to 65536"),
        (_config(n_routed_experts=5), r"gate\.weight has shape \[4, 20\].*\[5, 20\]"),
        (_tensors(lambda t: t.pop(UP)), r"has no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        (_tensors(lambda t: t.update({UP: torch.zeros(3, 20)})),
         r"up_proj\.weight has shape \[3, 20\].*\[12, 20\]"),
        (_fp8_without_scales, r"up_proj\.weight is fp8 but .*_scale_inv is missing"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_says_why_in_one_line(
    saved: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_pretrained(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value) or "config.json" in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is no directory; give"):
        load_pretrained(tmp_path / "nowhere")


def test_biases_stay_float32_when_weights_do_not(saved: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(saved), tmp_path / "small", dtype=torch.bfloat16)
    reader = ShardReader(tmp_path / "small")
    for name in reader.names:
        expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert reader.tensor(name).dtype == expected, name
    assert load_pretrained(tmp_path / "small")(TOKENS).dtype == torch.float32


@pytest.mark.parametrize(
    ("matrices", "norms", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (None, torch.bfloat16, torch.bfloat16),  # fp8 with scales in float32
    ],
    ids=str,
)
def test_the_dtype_is_that_of_most_weights(
    saved: Path, matrices: torch.dtype | None, norms: torch.dtype, expected: torch.dtype
) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("norm.weight") or matrices is None:
                tensors[name] = tensor.to(norms)
            elif tensor.ndim == 2:
                tensors[name] = tensor.to(matrices)

    rewrite(saved, convert)
    if matrices is None:
        to_fp8(saved, (8, 8))
    assert stored_dtype(ShardReader(saved)) == expected
