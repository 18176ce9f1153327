"""Complete configurations by name, each made by one function."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from errors import ConfigError
from jobs.config.run_config import RunConfig


def tiny() -> RunConfig:
    """A model that trains in seconds, for tests and first tries."""
    return RunConfig.from_dict(
        {
            "model": {
                "vocab_size": 512,
                "hidden_size": 32,
                "intermediate_size": 64,
                "moe_intermediate_size": 16,
                "num_hidden_layers": 2,
                "first_k_dense_replace": 1,
                "num_attention_heads": 2,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "max_position_embeddings": 128,
                "num_nextn_predict_layers": 1,
            },
            "training": {
                "steps": 20,
                "batch_size": 4,
                "microbatch_size": 2,
                "sequence_length": 32,
                "learning_rate": 3e-3,
                "warmup_steps": 2,
                "eval_interval": 10,
                "eval_rows": 8,
            },
            "checkpoint": {"interval": 10},
            "cluster": {"expert_hosts": 0},
        }
    )


def demo() -> RunConfig:
    """A model that learns Python source in about four minutes on two cores, with experts on two hosts."""
    return RunConfig.from_dict(
        {
            "model": {
                "vocab_size": 4096,
                "hidden_size": 192,
                "intermediate_size": 512,
                "moe_intermediate_size": 96,
                "num_hidden_layers": 4,
                "first_k_dense_replace": 1,
                "num_attention_heads": 6,
                "q_lora_rank": 96,
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
                "n_routed_experts": 16,
                "n_shared_experts": 1,
                "num_experts_per_tok": 4,
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "max_position_embeddings": 1024,
                "num_nextn_predict_layers": 1,
            },
            # The run is too short for a bias that moves by 0.001 a step.
            "balance": {"update_rate": 0.005},
            "training": {
                "steps": 500,
                "batch_size": 4,
                "microbatch_size": 2,
                "sequence_length": 256,
                "learning_rate": 3e-3,
                "warmup_steps": 40,
                "eval_interval": 100,
                "eval_rows": 32,
            },
            "checkpoint": {"interval": 200},
            "cluster": {"expert_hosts": 2},
        }
    )


def bench_20m() -> RunConfig:
    """The 20M-parameter shape (5.1M active) of the comparisons with other implementations."""
    return RunConfig.from_dict(
        {
            "model": {
                "vocab_size": 4096,
                "hidden_size": 256,
                "intermediate_size": 688,
                "moe_intermediate_size": 128,
                "num_hidden_layers": 6,
                "first_k_dense_replace": 1,
                "num_attention_heads": 8,
                "q_lora_rank": 96,
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
                "n_routed_experts": 32,
                "n_shared_experts": 1,
                "num_experts_per_tok": 4,
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "max_position_embeddings": 2048,
                "num_nextn_predict_layers": 0,
            },
            "training": {
                "steps": 500,
                "batch_size": 8,
                "microbatch_size": 4,
                "sequence_length": 256,
                "learning_rate": 2e-3,
                "warmup_steps": 50,
                "eval_interval": 100,
            },
            "cluster": {"expert_hosts": 2},
        }
    )


_DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "initializer_range": 0.006,
    "num_nextn_predict_layers": 1,
}
"""DeepSeek-V3's config.json."""


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3 with its MTP module, trained as in arXiv 2412.19437, section 4.2; for planning.

    The batch is the paper's final one (15,360 rows of 4,096 tokens), so steps are tokens / 62.9M.
    """
    tokens_per_step = 15360 * 4096
    return RunConfig.from_dict(
        {
            "model": _DEEPSEEK_V3,
            "balance": {
                "update_rate": [
                    {"step": 0, "value": 1e-3},
                    {"step": round(14.3e12 / tokens_per_step), "value": 0.0},
                ]
            },
            "mtp": {
                "weight": [{"step": 0, "value": 0.3}, {"step": round(10e12 / tokens_per_step), "value": 0.1}]
            },
            "training": {
                "steps": round(14.8e12 / tokens_per_step),
                "batch_size": 15360,
                "microbatch_size": 1,
                "sequence_length": 4096,
                "learning_rate": 2.2e-4,
                "warmup_steps": 2000,
                "dtype": "bfloat16",
                "recompute": True,
                "workers": 64,
                "eval_interval": 1000,
            },
            "checkpoint": {"interval": 1000},
            "cluster": {"expert_hosts": 32},
        }
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "demo": demo,
    "bench-20m": bench_20m,
    "deepseek-v3": deepseek_v3,
}
DEFAULT_PRESET = "demo"


def preset(name: str) -> RunConfig:
    """The preset of a name.

    Raises:
        ConfigError: There is none; the message lists the names.
    """
    if name in PRESETS:
        return PRESETS[name]()
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"preset {name!r} does not exist; {hint}")


def summary(config: RunConfig) -> dict[str, Any]:
    """Counts that are shown before a run: all parameters, active parameters, tokens of the run."""
    training = config.training
    return {
        "total_parameters": config.model.total_parameters(),
        "active_parameters": config.model.active_parameters(),
        "tokens": training.steps * training.batch_size * training.sequence_length,
    }


__all__ = ["DEFAULT_PRESET", "PRESETS", "preset", "summary"]
