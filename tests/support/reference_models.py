"""DeepseekV3 of transformers and our model, with the same random weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from model.checkpoints.hf_names import empty_shapes
from model.checkpoints.pretrained import CausalLM, RandomSource
from model.config import ModelConfig

TOLERANCE = 1e-4


def tiny(**changes: Any) -> ModelConfig:
    """A model of three layers, the first dense."""
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "initializer_range": 0.2,  # outputs of order one, so that the tolerance means something
        **changes,
    }
    return ModelConfig.model_validate(fields)


def ours(config: ModelConfig, *, seed: int = 0, bias: float = 0.1, shift: float = 0.0) -> CausalLM:
    """A random model with random norms and routing biases."""
    model = CausalLM(config)
    model.load(RandomSource(config, seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.trunk.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(bias * noise + shift)
    return model


def theirs(model: CausalLM, **changes: Any) -> DeepseekV3ForCausalLM:
    """transformers' model with the same weights, copied without a checkpoint."""
    config = DeepseekV3Config(**{**model.config.to_hf(), **changes})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    reference = DeepseekV3ForCausalLM(config)
    main = set(reference.state_dict())
    state = {name: t for name, t in model.trunk.state_dict().items() if name in main}
    state |= {name: torch.empty(shape) for name, shape in empty_shapes(model.config).items() if name in main}
    for layer in model.config.moe_layers:
        if layer < model.config.num_hidden_layers:
            state.update(_experts(model, layer, f"model.layers.{layer}.mlp.experts."))
    reference.load_state_dict(state, strict=True)
    return reference.eval()


def random_reference(values: dict[str, Any], *, seed: int = 0, bias: float = 0.1) -> DeepseekV3ForCausalLM:
    """transformers' model of a config.json, with random weights, norms and routing biases."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(**copy.deepcopy(values))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    reference = DeepseekV3ForCausalLM(config)
    scatter(reference, bias)
    return reference.eval()


def scatter(model: nn.Module, bias: float = 0.1) -> None:
    """Draw all weights: matrices for outputs of order one, norms around one, routing biases around zero."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.2)
            else:
                tensor.normal_(0.0, bias if name.endswith("e_score_correction_bias") else 0.2)


def like(reference: DeepseekV3ForCausalLM, values: dict[str, Any]) -> CausalLM:
    """Our model of a config.json, without MTP modules, with the weights of transformers' model."""
    config = ModelConfig.from_hf(values).model_copy(update={"num_nextn_predict_layers": 0})
    model = CausalLM(config)
    state = reference.state_dict()
    model.trunk.load_state_dict({name: state[name] for name in model.trunk.state_dict()})
    with torch.no_grad():
        for layer in config.moe_layers:
            prefix = f"model.layers.{layer}.mlp.experts."
            w13, w2 = model.experts.weights(layer)
            w13.copy_(state[prefix + "gate_up_proj"])
            w2.copy_(state[prefix + "down_proj"])
    return model.to(reference.dtype)


def published(reference: DeepseekV3ForCausalLM, modules: MtpModel | None = None) -> dict[str, Tensor]:
    """The tensors of transformers' models as DeepSeek publishes them: single experts, modules as layers."""
    tensors = _single_experts(reference.state_dict())
    for k, module in enumerate(() if modules is None else modules.layers):
        prefix = f"model.layers.{reference.config.num_hidden_layers + k}."
        for name, tensor in _single_experts(module.state_dict()).items():
            name = name.replace("post_norm.", "shared_head.norm.").removeprefix("mtp_block.")
            tensors[prefix + name] = tensor
        tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _single_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    single: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, stacked = name.rpartition(".experts.")
        if stacked == "gate_up_proj":
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                single[f"{stem}.experts.{expert}.gate_proj.weight"] = gate.clone()
                single[f"{stem}.experts.{expert}.up_proj.weight"] = up.clone()
        elif stacked == "down_proj":
            single |= {f"{stem}.experts.{e}.down_proj.weight": t.clone() for e, t in enumerate(tensor)}
        else:
            single[name] = tensor
    return single


def their_modules(model: CausalLM, reference: DeepseekV3ForCausalLM) -> MtpModel:
    """transformers' MTP modules with the same weights."""
    modules = MtpModel(reference, model.config.num_nextn_predict_layers)
    named = model.trunk.state_dict()
    for k, layer in enumerate(model.config.mtp_layers):
        prefix = f"model.layers.{layer}."
        state = dict(_experts(model, layer, "mtp_block.mlp.experts."))
        for name, tensor in named.items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                if short == "shared_head.norm.weight":
                    short = "post_norm.weight"
                elif short.split(".")[0] not in ("enorm", "hnorm", "eh_proj"):
                    short = "mtp_block." + short
                state[short] = tensor
        modules.layers[k].load_state_dict(state, strict=True)
    return modules.eval()


def _experts(model: CausalLM, layer: int, prefix: str) -> dict[str, Tensor]:
    w13, w2 = model.experts.weights(layer)
    return {prefix + "gate_up_proj": w13.detach(), prefix + "down_proj": w2.detach()}


def random_tokens(config: ModelConfig, *shape: int, seed: int = 1) -> Tensor:
    """Random tokens of the vocabulary."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
