"""Sampling with drafts has the model's distribution, and the tokens of plain decoding.

What is tested is the joint distribution of the first three tokens. The first comes with the prompt; the
second and the third are drafted, so that every outcome goes through drafts accepted and drafts refused.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from engine.acceptance import Acceptance
from engine.engine import Engine
from engine.params import SamplingParams
from engine.sampling import probabilities
from engine.scheduler import Share
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from model.causal_lm import CausalLM
from model.config import ModelConfig

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH = 5, 3
PROMPT = [3, 1, 4, 1]
DRAWS = 20_000
REJECTED = 0.001
PARAMS = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(5)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        num_nextn_predict_layers=2,
    )
    model = CausalLM(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def draw(
    model: CausalLM, drafts: int, fields: dict[str, float], *, first_seed: int
) -> tuple[Counter[Tokens], Engine]:
    """Counts of the tokens that follow the prompt, over `DRAWS` requests with different seeds."""
    settings = EngineSettings(
        cache_tokens=16384, page_size=8, max_batch_tokens=4096, max_sequences=1024, drafts=drafts
    )
    engine = Engine(TrunkWeights.of(model.trunk), model.experts, settings)
    sequences = [
        engine.add(str(seed), PROMPT, SamplingParams(max_tokens=LENGTH, seed=seed, **fields))
        for seed in range(first_seed, first_seed + DRAWS)
    ]
    while engine.has_work:
        engine.step()
    return Counter(tuple(sequence.output) for sequence in sequences), engine


@torch.no_grad()
def exact(model: CausalLM, fields: dict[str, float]) -> dict[Tokens, float]:
    """The probability of every outcome, by a full forward pass for each context."""
    params = SamplingParams(**fields)
    known: dict[Tokens, float] = {(): 1.0}
    for _ in range(LENGTH):
        logits = model(torch.tensor([[*PROMPT, *context] for context in known]))[:, -1]
        known = {
            (*context, token): before * float(chance)
            for (context, before), row in zip(known.items(), logits, strict=True)
            for token, chance in enumerate(probabilities(row, params))
        }
    return known


def p_value(statistic: float, degrees: int) -> float:
    """p-value of a chi-square statistic."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def against(expected: dict[Tokens, float], counts: Counter[Tokens]) -> float:
    """p-value of counts under exact probabilities; rare outcomes are pooled."""
    cells: list[tuple[float, int]] = []
    rare = (0.0, 0)
    for outcome, chance in expected.items():
        wanted, seen = chance * DRAWS, counts[outcome]
        assert chance > 0 or seen == 0, f"{outcome} cannot be"
        if wanted >= 10:
            cells.append((wanted, seen))
        else:
            rare = (rare[0] + wanted, rare[1] + seen)
    if rare[0] >= 10:
        cells.append(rare)
    return p_value(sum((seen - wanted) ** 2 / wanted for wanted, seen in cells), len(cells) - 1)


def between(one: Counter[Tokens], other: Counter[Tokens]) -> float:
    """p-value of two samples of equal size under one distribution."""
    pairs = [(one[outcome], other[outcome]) for outcome in one | other]
    common = [pair for pair in pairs if sum(pair) >= 20]
    rare = [pair for pair in pairs if sum(pair) < 20]
    if rare:
        common.append((sum(a for a, _ in rare), sum(b for _, b in rare)))
    return p_value(sum((a - b) ** 2 / (a + b) for a, b in common), len(common) - 1)


@pytest.fixture(scope="module")
def plain(model: CausalLM) -> dict[str, Counter[Tokens]]:
    """Counts of plain decoding, with seeds that no other sample uses."""
    return {name: draw(model, 0, fields, first_seed=DRAWS)[0] for name, fields in PARAMS.items()}


@pytest.mark.parametrize("name", PARAMS)
def test_drafts_do_not_change_the_distribution(
    model: CausalLM, plain: dict[str, Counter[Tokens]], name: str
) -> None:
    truth = exact(model, PARAMS[name])
    assert math.isclose(sum(truth.values()), 1.0)
    drafted, engine = draw(model, 2, PARAMS[name], first_seed=0)
    for place in (0, 1):  # many of both kinds
        assert 0.1 < engine.stats.accepted[place] / engine.stats.proposed[place] < 0.9
    assert against(truth, drafted) > REJECTED
    assert against(truth, plain[name]) > REJECTED
    assert between(drafted, plain[name]) > REJECTED


class Eager(Acceptance):
    """A sampler that accepts drafts too often, with odds of 9 to 8."""

    def accept(self, share: Share, logits: Tensor, greedy: list[int]) -> list[int]:
        logits = logits.clone()
        for at, draft in enumerate(share.sequence.drafts[: share.drafts]):
            logits[at - 1 - share.drafts, draft] += math.log(9 / 8)
        return super().accept(share, logits, greedy)


def test_a_sampler_that_favours_drafts_is_found_out(
    model: CausalLM, plain: dict[str, Counter[Tokens]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "temperature 1"
    monkeypatch.setattr("engine.engine.Acceptance", Eager)
    biased, _ = draw(model, 2, PARAMS[name], first_seed=0)
    assert against(exact(model, PARAMS[name]), biased) < REJECTED
    assert between(biased, plain[name]) < REJECTED


def test_another_temperature_is_found_out(model: CausalLM, plain: dict[str, Counter[Tokens]]) -> None:
    warmer = exact(model, {"temperature": 1.05})
    assert against(warmer, plain["temperature 1"]) < REJECTED
    assert between(plain["temperature 0.7"], plain["temperature 1"]) < REJECTED


COMPANIES = {
    "no drafts": EngineSettings(drafts=0),
    "one draft": EngineSettings(drafts=1),
    "two drafts": EngineSettings(),
    "one by one": EngineSettings(max_sequences=1, drafts=0),
    "one by one with drafts": EngineSettings(max_sequences=1),
    "few at a time": EngineSettings(max_batch_tokens=11, max_sequences=7),
    "preemption": EngineSettings(cache_tokens=128, page_size=4),
    "no prefixes": EngineSettings(page_size=2, prefix_caching=False),
}


def requests() -> list[tuple[str, list[int], SamplingParams]]:
    """Requests with different sampling parameters and seeds."""
    source = random.Random(4)
    ways: list[dict[str, object]] = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 2},
        {"temperature": 1.0, "logit_bias": {2: 1.5}, "min_tokens": 4, "stop_token_ids": (0,)},
    ]
    return [
        (
            str(number),
            [source.randrange(VOCABULARY) for _ in range(source.randint(1, 20))],
            SamplingParams(max_tokens=source.randint(8, 24), seed=number, **way),  # type: ignore[arg-type]
        )
        for number, way in enumerate(itertools.islice(itertools.cycle(ways), 60))
    ]


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_seed_gives_the_same_tokens_in_any_company(model: CausalLM, order: str) -> None:
    said: dict[str, dict[str, list[int]]] = {}
    for name, settings in COMPANIES.items():
        engine = Engine(TrunkWeights.of(model.trunk), model.experts, settings)
        items = requests()
        if order == "shuffled":
            random.Random(name).shuffle(items)
        waiting = iter(items)
        sequences = [engine.add(*next(waiting)) for _ in range(20)]
        while engine.has_work:
            engine.step()
            if (late := next(waiting, None)) is not None:  # the others come while these run
                sequences.append(engine.add(*late))
        assert len(sequences) == len(items)
        assert (engine.scheduler.preemptions > 0) == (name == "preemption")
        said[name] = {sequence.id: sequence.output for sequence in sequences}
    alone = said.pop("one by one")
    assert len({tuple(tokens) for tokens in alone.values()}) > 50
    for name, tokens in said.items():
        assert tokens == alone, name
