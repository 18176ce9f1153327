"""Models for tests of generation, and engines over experts in process or on hosts."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.router import Router, RouterSettings
from actors.router.engine_lanes import EngineLanes
from channels.choose import connect
from cluster.topology import RoutingTable, experts_held
from engine.engine import Engine
from engine.params import SamplingParams
from engine.sequence import Sequence as Request
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from jobs.fleet.expert_hosts import placement
from model.causal_lm import CausalLM
from model.config import ModelConfig
from support.reference_models import ours, theirs
from support.training_job import serving, text_corpus, train
from support.training_job import tiny as tiny_run

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


def in_float64(model: CausalLM) -> CausalLM:
    """The model in float64, in which the order of additions changes no argmax."""
    wide = CausalLM(model.config, dtype=torch.float64).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def random_model(config: ModelConfig) -> CausalLM:
    """Random weights, norms and biases, in float64."""
    return in_float64(ours(config))


def trained_model(output: Path, *, steps: int, modules: int) -> CausalLM:
    """A tiny model with MTP modules, trained on a Python source, in float64."""
    config = tiny_run(
        # With four experts of two groups alone, transformers scores groups as the paper does.
        model={"n_routed_experts": 16, "num_experts_per_tok": 4, "num_nextn_predict_layers": modules},
        training={"steps": steps, "learning_rate": 6e-3, "eval_interval": 0, "tensorboard": False},
        checkpoint={"interval": 0},
        cluster={"expert_hosts": 0},
    )
    outcome = train(config, text_corpus(config, TEXT), output)
    assert outcome.losses[-1] < 0.4 * outcome.losses[0]
    model = CausalLM(config.model, dtype=torch.float64).eval()
    model.trunk.load_state_dict(outcome.trunk)
    with torch.no_grad():
        for (layer, expert), (w13, w2) in outcome.experts.items():
            ours13, ours2 = model.experts.weights(layer)
            ours13[expert].copy_(w13)
            ours2[expert].copy_(w2)
    return model


def random_prompts(config: ModelConfig, lengths: Sequence[int], each: int) -> list[list[int]]:
    """`each` prompts of each length; the later ones of a length begin like its first."""
    source = random.Random(1)
    prompts: list[list[int]] = []
    for length in lengths:
        first = [source.randrange(config.vocab_size) for _ in range(length)]
        for number in range(each):
            kept = length * (each - number) // each
            prompts.append(first[:kept] + [source.randrange(config.vocab_size) for _ in range(length - kept)])
    return prompts


def text_prompts(lengths: Sequence[int], each: int) -> list[list[int]]:
    """Pieces of the text that `trained_model` has learned, as its tokens."""
    source = random.Random(2)
    data = TEXT.encode()
    return [
        list(data[start : start + length])
        for length in lengths
        for start in (source.randrange(len(data) - length) for _ in range(each))
    ]


@torch.no_grad()
def generated_by_transformers(
    model: CausalLM, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The tokens that `transformers.generate` adds greedily to each prompt, in batches of one length."""
    reference = theirs(model).double()
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0
    said: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [at for at, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[at] for at in places])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
        )
        for at, row in zip(places, out[:, length:].tolist(), strict=True):
            assert len(row) == count
            said[at] = row
    return [said[at] for at in range(len(prompts))]


class _Source:
    """A source of weights for hosts: a model's experts."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        w13, w2 = self._model.experts.weights(layer)
        return w13[expert].detach(), w2[expert].detach()

    def trunk(self) -> dict[str, Tensor]:
        return {}


@contextmanager
def engine_over(
    model: CausalLM, settings: EngineSettings, *, hosts: int = 0, channel: str = "local"
) -> Iterator[Engine]:
    """An engine with experts in process, or on hosts behind a channel; asserts that hosts keep nothing."""
    weights = TrunkWeights.of(model.trunk)
    if hosts == 0:
        yield Engine(weights, model.experts, settings)
        return
    config, holders = model.config, placement(model.config, hosts)
    made = [
        ExpertHost(
            f"host-{index}",
            config,
            InitialExperts(source=_Source(model), experts=experts_held(holders, config.moe_layers, index)),
            settings=HostSettings(dtype=torch.float64),
        )
        for index in range(hosts)
    ]
    with ExitStack() as stack:
        infos = tuple(stack.enter_context(serving(host, channel)) for host in made)
        table = RoutingTable(epoch=0, hosts=infos, holders=holders)
        router = Router(
            "replica",
            "serve",
            config,
            table,
            lambda info: connect(info.addresses[channel]),
            RouterSettings(lanes=2, timeout=60),
        )
        stack.callback(router.close)
        lanes = EngineLanes(router)
        yield Engine(weights, lanes, settings, on_step=lanes.begin)
        if settings.overlap_from is not None:
            assert all(lane.counters.tokens > 0 for lane in lanes.lanes)
        assert all(host.stats().rows > 0 for host in made)
        assert [host.stats().kept for host in made] == [0] * hosts


def greedily(engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> list[Request]:
    """Generate greedily after each prompt, all requests at once."""
    params = SamplingParams(max_tokens=count, temperature=0.0)
    sequences = [engine.add(str(at), prompt, params) for at, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert engine.pool.held == 0
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    return sequences
