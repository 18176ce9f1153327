"""Times training steps: experts in process, experts on hosts, and transformers' implementation.

Each contender has its own process (and one for each host), so that its idle threads do not slow down the
others. They alternate in rounds, so that other load on the machine affects all of them; ratios are taken
within a round, and medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.contenders import Contender, has_transformers, machine, matmul, on_device
from benchmarks.training_steps import ours, transformers
from jobs.config.device_and_dtype import worker_device
from jobs.config.presets import summary
from jobs.config.run_config import RunConfig
from model.config import ModelConfig

_WARM_UP = 3  # steps that fill caches and pools
_PER_ROUND = 3  # steps of a contender in its turn
_HOSTS = 2  # where the configuration keeps its experts in process


def bench_train(config: RunConfig, *, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Time training steps on random tokens, without MTP, evaluation and checkpoints.

    A step includes forward, backward, the norm of all gradients, clipping and AdamW, and in our
    implementation the gates' bias and both phases of the hosts' commit.

    Args:
        config: The configuration with the model.
        steps: Timed steps of each contender, rounded up to whole rounds.
        device: cpu, or cuda for all contenders and hosts on one GPU, in bfloat16.

    Returns:
        Tokens per second of each contender (medians), their ratios, the share of the measured peak of matrix
        products that our local step reaches, and `spreads`: the lowest and highest round of each figure.
        Without transformers installed its figures are None. `load_before` is the machine's load average at
        the start; on a busy machine the ratios mean little, because threads that wait for each other also
        wait for other work.

    Raises:
        RaymoeError: A contender failed, with its error text.
    """
    load = os.getloadavg()[0]
    local = _with_hosts(config, 0, device)
    remote = _with_hosts(config, config.cluster.expert_hosts or _HOSTS, device)
    place = worker_device(local)
    rounds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        contenders = {
            "local": stack.enter_context(Contender("local", ours, local)),
            "remote": stack.enter_context(Contender("remote", ours, remote)),
        }
        if has_transformers():
            contenders["transformers"] = stack.enter_context(Contender("transformers", transformers, local))
        for contender in contenders.values():
            contender.steps(_WARM_UP)
        peak = stack.enter_context(Contender("matmul", matmul, local))
        for _ in range(max(1, -(-steps // _PER_ROUND))):
            for name, contender in {**contenders, "matmul": peak}.items():
                rounds.setdefault(name, []).append(statistics.median(contender.steps(_PER_ROUND)))
    figures = _figures(local, rounds)
    counts = summary(config)
    return {
        **{name: statistics.median(values) if values else None for name, values in figures.items()},
        "spreads": {name: [min(values), max(values)] for name, values in figures.items() if values},
        "load_before": load,
        "rounds": len(rounds["local"]),
        "steps_per_round": _PER_ROUND,
        "tokens_per_step": _tokens(config),
        "total_parameters": counts["total_parameters"],
        "active_parameters": counts["active_parameters"],
        "expert_hosts": remote.cluster.expert_hosts,
        "machine": machine(place),
    }


def _tokens(config: RunConfig) -> int:
    """Number of tokens of a step."""
    return config.training.batch_size * config.training.sequence_length


def _figures(local: RunConfig, rounds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Speeds and their ratios, one value for each round.

    Args:
        local: The configuration of the local contender.
        rounds: Seconds of a step of each contender, one value for each round.
    """
    tokens = _tokens(local)
    flops = tokens * flops_per_token(local.model, local.training.sequence_length)
    figures: dict[str, list[float]] = {
        f"{name}_tokens_per_second": [tokens / seconds for seconds in rounds.get(name, ())]
        for name in ("local", "remote", "transformers")
    }
    return figures | {
        "local_over_transformers": _ratio(rounds, "transformers", "local"),
        "remote_over_local": _ratio(rounds, "local", "remote"),
        "matmul_peak_gflops": [1e-9 / seconds for seconds in rounds["matmul"]],
        "fraction_of_matmul_peak": [
            flops * per_flop / seconds
            for per_flop, seconds in zip(rounds["matmul"], rounds["local"], strict=True)
        ],
    }


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Operations of one token's forward and backward pass: matrix products and causal attention only."""
    matrices = model.active_parameters() - model.vocab_size * model.hidden_size  # a look-up is no product
    attended = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * length / 2
    return 3 * 2 * (matrices + model.num_hidden_layers * attended)


def _with_hosts(config: RunConfig, hosts: int, device: str) -> RunConfig:
    values = config.to_dict()
    on_device(values, device)
    values["model"]["num_nextn_predict_layers"] = 0
    values["training"] |= {"workers": 1, "warmup_steps": 0, "steps": 1 << 30}
    values["cluster"]["expert_hosts"] = hosts
    return RunConfig.from_dict(values)


def _ratio(rounds: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    return [a / b for a, b in zip(rounds.get(over, ()), rounds.get(under, ()), strict=False)]


__all__ = ["bench_train", "flops_per_token"]
