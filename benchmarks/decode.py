"""Times greedy decoding: experts in process, experts on hosts, and transformers' `generate`.

Every contender has its own process, and they alternate, as in `benchmarks.train`. A step reads a prompt of
random tokens and generates `TOKENS` tokens for each row of a batch.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch

from benchmarks.contenders import Contender, Step, finished, has_transformers, machine, on_device
from benchmarks.expert_lanes import expert_lanes
from jobs.config.device_and_dtype import resolve_dtype, worker_device
from jobs.config.run_config import RunConfig

TOKENS: Final = 64
PROMPT: Final = 64
BATCHES: Final = (1, 8)
CONTEXTS: Final = (64, 1024)
_HOSTS: Final = 2
_MARGIN: Final = 64  # positions beyond the longest text


def bench_decode(config: RunConfig, *, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time decoding with a configuration's model, random weights and no MTP modules.

    Args:
        config: The configuration.
        rounds: Number of rounds, in which the contenders alternate.
        device: cpu, or cuda for all contenders and hosts on one GPU, in bfloat16.

    Returns:
        For each batch the tokens per second of every contender (medians) and their ratios, the growth of
        the time per token from a context of 64 to one of 1,024, `spreads` and the machine's load before.
        Without transformers installed its figures are None.

    Raises:
        RaymoeError: A contender failed, with its error text.
    """
    load = os.getloadavg()[0]
    plain = _prepared(config, 0, device)
    remote = _prepared(config, config.cluster.expert_hosts or _HOSTS, device)
    place = worker_device(plain)
    turns: dict[str, list[float]] = {}
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for batch in BATCHES:
            made = {
                f"local_{batch}": (partial(ours, batch=batch, prompt=PROMPT), plain),
                f"remote_{batch}": (partial(ours, batch=batch, prompt=PROMPT), remote),
            }
            if has_transformers():
                made[f"transformers_{batch}"] = (partial(transformers, batch=batch), plain)
            for name, (build, chosen) in made.items():
                contenders[name] = stack.enter_context(Contender(name, build, chosen))
        for context in CONTEXTS:
            build = partial(ours, batch=1, prompt=context, alone=True)
            contenders[f"context_{context}"] = stack.enter_context(
                Contender(f"context_{context}", build, plain)
            )
        for contender in contenders.values():
            contender.steps(1)
        for _ in range(rounds):
            for name, contender in contenders.items():
                turns.setdefault(name, []).extend(contender.steps(1))
    result: dict[str, Any] = {f"batch_{batch}": _figures(turns, batch) for batch in BATCHES}
    short, long = (turns[f"context_{context}"] for context in CONTEXTS)
    result["context_growth"] = statistics.median(b / a for a, b in zip(short, long, strict=True))
    result["spreads"] = {name: [min(values), max(values)] for name, values in turns.items()}
    result["load_before"] = load
    result["rounds"] = rounds
    result["tokens"] = TOKENS
    result["machine"] = machine(place)
    return result


def _figures(turns: Mapping[str, Sequence[float]], batch: int) -> dict[str, float | None]:
    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    def ratio(over: str, under: str) -> float | None:
        pairs = zip(turns.get(f"{over}_{batch}", ()), turns.get(f"{under}_{batch}", ()), strict=False)
        return median([a / b for a, b in pairs])

    speeds = {
        f"{name}_tokens_per_second": median([batch * TOKENS / s for s in turns.get(f"{name}_{batch}", ())])
        for name in ("local", "remote", "transformers")
    }
    return {
        **speeds,
        "local_over_transformers": ratio("transformers", "local"),
        "remote_over_local": ratio("local", "remote"),
    }


def _prepared(config: RunConfig, hosts: int, device: str) -> RunConfig:
    values = config.to_dict()
    on_device(values, device)
    values["model"]["num_nextn_predict_layers"] = 0
    longest = max(CONTEXTS) + TOKENS + _MARGIN
    values["model"]["max_position_embeddings"] = max(values["model"]["max_position_embeddings"], longest)
    values["cluster"]["expert_hosts"] = hosts
    return RunConfig.from_dict(values)


@contextmanager
def ours(config: RunConfig, *, batch: int, prompt: int, alone: bool = False) -> Iterator[Step]:
    """Our engine, with experts in the process, or on hosts if the configuration has some.

    Args:
        alone: Time only the tokens after the first one, without reading the prompt.
    """
    from engine.engine import Engine
    from engine.params import SamplingParams
    from engine.settings import EngineSettings
    from engine.weights import TrunkWeights
    from model.causal_lm import CausalLM
    from model.checkpoints.sources import RandomSource
    from model.experts.protocols import Experts

    model = config.model
    torch.set_num_threads(config.training.threads or os.cpu_count() or 1)
    device, dtype = worker_device(config), resolve_dtype(config)
    whole = CausalLM(model, dtype=dtype).eval()
    whole.load(RandomSource(model, config.training.seed, dtype))
    whole.to(device)
    with ExitStack() as stack:
        experts: Experts = whole.experts
        on_step: Callable[[int], None] | None = None
        if config.cluster.expert_hosts:
            lanes = stack.enter_context(
                expert_lanes(model, config.cluster, seed=config.training.seed, dtype=dtype)
            )
            experts, on_step = lanes, lanes.begin
        settings = EngineSettings(
            cache_tokens=batch * (prompt + TOKENS + _MARGIN), prefix_caching=False, max_batch_tokens=2048
        )
        engine = Engine(TrunkWeights.of(whole.trunk), experts, settings, on_step=on_step)
        generator = torch.Generator().manual_seed(config.training.seed)
        params = SamplingParams(max_tokens=TOKENS + alone, temperature=0.0)

        def step() -> float:
            prompts = torch.randint(model.vocab_size, (batch, prompt), generator=generator).tolist()
            began = time.perf_counter()
            for index, tokens in enumerate(prompts):
                engine.add(str(index), tokens, params)
            if alone:
                engine.step()
                began = time.perf_counter()
            while engine.has_work:
                engine.step()
            return time.perf_counter() - began

        yield step


@contextmanager
def transformers(config: RunConfig, *, batch: int) -> Iterator[Step]:
    """transformers' DeepSeek-V3 with `generate` and its cache, in its fastest configuration."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(config.training.threads or os.cpu_count() or 1)
    torch.manual_seed(config.training.seed)
    shape = DeepseekV3Config(**config.model.to_hf())
    shape._attn_implementation, shape._experts_implementation = "sdpa", "grouped_mm"
    device = worker_device(config)
    model = DeepseekV3ForCausalLM(shape).eval().to(device=device, dtype=resolve_dtype(config))
    generator = torch.Generator().manual_seed(config.training.seed)

    def step() -> float:
        tokens = torch.randint(config.model.vocab_size, (batch, PROMPT), generator=generator).to(device)
        mask = torch.ones_like(tokens)
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        finished(device)
        return time.perf_counter() - began

    yield step


__all__ = ["bench_decode", "ours", "transformers"]
