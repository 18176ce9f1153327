"""Published models of the architecture, scaled down: logits, MTP logits and weights are transformers'.

Each configuration has the keys and values of its model's config.json; only sizes are divided. Rotary
dimensions keep their number, so that the rotary settings act as they do there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from jobs.tools.convert import export_checkpoint, import_checkpoint
from model.causal_lm import CausalLM
from model.checkpoints.fp8 import SCALE_SUFFIX, quantize
from model.checkpoints.pretrained import load_pretrained, save_pretrained
from model.checkpoints.shards import ShardReader
from model.losses.training_losses import drafts
from support.reference_models import TOLERANCE, published, random_reference, random_tokens, scatter

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI: dict[str, Any] = {
    **{name: value for name, value in V3.items() if name != "ep_size"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}
MOONLIGHT: dict[str, Any] = {
    **{name: value for name, value in KIMI.items() if name not in ("quantization_config", "rope_scaling")},
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.446,
}
MODELS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": V3,
    "DeepSeek-R1": {**V3, "transformers_version": "4.46.3"},
    "DeepSeek-V3.1": {
        **V3,
        "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
        "transformers_version": "4.44.2",
    },
    "Kimi-K2": KIMI,
    "Kimi-K2-0905": {
        **KIMI,
        "max_position_embeddings": 262144,
        "rope_scaling": {**KIMI["rope_scaling"], "factor": 64.0},
    },
    "Moonlight": MOONLIGHT,
}
_DIVISORS = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 32,
    "q_lora_rank": 128,
    "n_routed_experts": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 1280,
}


def scaled(name: str) -> dict[str, Any]:
    """A model's config.json with sizes divided, and one layer with experts after the dense ones."""
    values = dict(MODELS[name])
    for key, divisor in _DIVISORS.items():
        if values[key] is not None:
            values[key] //= divisor
    values["num_hidden_layers"] = values["first_k_dense_replace"] + 1
    values["initializer_range"] = 0.2  # outputs of order one, so that the tolerance means something
    if "quantization_config" in values:
        values["quantization_config"] = {**values["quantization_config"], "weight_block_size": [8, 8]}
    return values


def references(values: dict[str, Any]) -> tuple[DeepseekV3ForCausalLM, MtpModel | None]:
    """transformers' model and MTP modules of a config.json, with random weights."""
    reference = random_reference(
        {k: v for k, v in values.items() if k not in ("quantization_config", "torch_dtype")}
    )
    if not values["num_nextn_predict_layers"]:
        return reference, None
    modules = MtpModel(reference, values["num_nextn_predict_layers"])
    scatter(modules)
    return reference, modules.eval()


def write(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))


@torch.no_grad()
def assert_equal(model: CausalLM, reference: DeepseekV3ForCausalLM, modules: MtpModel | None) -> None:
    """Compare the logits of the model and of its MTP modules."""
    depth, length = len(modules.layers) if modules is not None else 0, 20
    assert model.config.num_nextn_predict_layers == depth
    tokens = random_tokens(model.config, 2, length + depth + 1)
    through = model.trunk.start(tokens[:, :length], experts=model.experts)
    hidden = model.trunk.run(tokens[:, :length], through)
    found = reference(input_ids=tokens[:, :length], output_hidden_states=True)
    assert found.logits.std() > 0.1
    torch.testing.assert_close(model.trunk.logits(hidden.normed), found.logits, rtol=0, atol=TOLERANCE)
    if modules is None:
        return
    last, cache = found.hidden_states[-1], MtpCache(config=reference.config.get_mtp_config())
    for k, (draft, _) in enumerate(drafts(model.trunk, tokens, None, hidden, through)):
        positions = torch.arange(k + 1, length + k + 1).unsqueeze(0)
        last = modules.forward_layer(k, last, positions, cache, input_ids=tokens[:, k + 1 : length + k + 1])
        expected = reference.lm_head(last)
        torch.testing.assert_close(model.trunk.logits(draft), expected, rtol=0, atol=TOLERANCE)


def written(directory: Path, name: str, dtype: torch.dtype) -> tuple[DeepseekV3ForCausalLM, MtpModel | None]:
    """Write a model's directory; return what transformers has of it."""
    values = scaled(name)
    values.pop("quantization_config", None)
    reference, modules = references(values)
    reference.to(dtype)
    if modules is not None:
        modules.to(dtype)
    write(directory, values, published(reference, modules))
    return reference, modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, modules = written(tmp_path, name, dtype)
    assert_equal(load_pretrained(tmp_path, dtype=dtype), reference, modules)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2", "Moonlight"])
def test_weights_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    """Through import and export, which transformers then loads without a missing tensor."""
    reference, modules = written(tmp_path, name, torch.float32)
    import_checkpoint(tmp_path, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    first, back = ShardReader(tmp_path), ShardReader(tmp_path / "back")
    assert back.names == first.names
    assert all(torch.equal(back.tensor(tensor), first.tensor(tensor)) for tensor in back.names)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in reference.state_dict().items())
    assert bool(info["unexpected_keys"]) == (modules is not None)


@pytest.mark.parametrize("name", [name for name, values in MODELS.items() if "quantization_config" in values])
def test_fp8(name: str, tmp_path: Path) -> None:
    """The weights in fp8 with scales of blocks, which are powers of two where scale_fmt says so."""
    values = scaled(name)
    block = tuple(values["quantization_config"]["weight_block_size"])
    reference, modules = references(values)
    tensors = published(reference, modules)
    for weight in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n]:
        tensors[weight], scale = quantize(tensors[weight], block)
        if "scale_fmt" in values["quantization_config"]:
            scale = scale.log2().ceil().exp2()
        tensors[weight + SCALE_SUFFIX] = scale
    write(tmp_path, values, tensors)
    model = load_pretrained(tmp_path)
    # The reference has each value times the scale of its own block.
    exact = {}
    for weight, tensor in tensors.items():
        if weight + SCALE_SUFFIX in tensors:
            row, column = (torch.arange(n) // b for n, b in zip(tensor.shape, block, strict=True))
            tensor = tensor.float() * tensors[weight + SCALE_SUFFIX][row][:, column]
        if not weight.endswith(SCALE_SUFFIX):
            exact[weight] = tensor
    write(tmp_path, {**values, "quantization_config": None, "model_type": "deepseek_v3"}, exact)
    again = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_equal(model_without_modules(model), plain, None)


def model_without_modules(model: CausalLM) -> CausalLM:
    """The main model alone, with the same weights."""
    main = CausalLM(model.config.model_copy(update={"num_nextn_predict_layers": 0}))
    state = model.state_dict()
    main.load_state_dict({name: state[name] for name in main.state_dict()})
    return main


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_stored_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """config.json names the dtype of the weights, the index their bytes, and transformers loads both."""
    values = scaled("Moonlight")
    reference, _ = references(values)
    write(tmp_path, values, published(reference))
    model = load_pretrained(tmp_path)
    save_pretrained(model, tmp_path / "saved", dtype=dtype, shard_bytes=20_000)
    reader = ShardReader(tmp_path / "saved")
    sizes = [reader.tensor(name).nbytes for name in reader.names]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == dtype
    for name, tensor in published(theirs).items():
        stored = reader.tensor(name)
        assert torch.equal(tensor.to(stored.dtype), stored), name
