"""The engine generates the tokens of `transformers.generate` in every mode.

Everything is in float64, so that no order of additions turns an argmax. The full matrix of models, engines,
hosts and channels runs under `make soak`; `make test` runs a covering part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.sequence import Sequence
from engine.settings import EngineSettings
from model.causal_lm import CausalLM
from support.generation import (
    engine_over,
    generated_by_transformers,
    greedily,
    random_model,
    random_prompts,
    text_prompts,
    trained_model,
)
from support.reference_models import tiny

NEW = 64
LENGTHS, EACH = (1, 9, 24, 40), 5

SETTINGS = {
    "one by one": EngineSettings(max_sequences=1, drafts=0),
    "mixed batch": EngineSettings(drafts=0),
    "preemption": EngineSettings(cache_tokens=256, page_size=8, drafts=0),
    "chunked prefill": EngineSettings(max_batch_tokens=24, drafts=0),
    "one draft": EngineSettings(drafts=1),
    "two drafts": EngineSettings(drafts=2),
    "drafts, chunks and preemption": EngineSettings(cache_tokens=256, page_size=8, max_batch_tokens=31),
    "drafts one by one": EngineSettings(max_sequences=1, page_size=4),
    "overlap": EngineSettings(drafts=0, max_batch_tokens=64, overlap_from=2),
    "overlap, drafts, chunks and preemption": EngineSettings(
        cache_tokens=256, page_size=8, max_batch_tokens=31, overlap_from=2
    ),
}
MODELS: dict[str, Callable[[Path], CausalLM]] = {
    "random": lambda _: random_model(tiny(num_nextn_predict_layers=2)),
    "trained": lambda output: trained_model(output, steps=400, modules=2),
    "direct queries": lambda _: random_model(
        tiny(q_lora_rank=None, rope_interleave=False, num_nextn_predict_layers=1)
    ),
    "trained longer": lambda output: trained_model(output, steps=1500, modules=1),
}
HOSTS, CHANNELS = (0, 1, 2, 4), ("shm", "collective", "grpc")
ALL = [
    (model, settings, hosts, channel)
    for model, settings, hosts, channel in itertools.product(MODELS, SETTINGS, HOSTS, CHANNELS)
    if (hosts or channel == CHANNELS[0])
    and (hosts or "overlap" not in settings)  # only hosts give the halves something to wait for
]
COVERING = [
    *(("random", settings, 0, "shm") for settings in SETTINGS if "overlap" not in settings),
    *(("trained", settings, 0, "shm") for settings in SETTINGS if "overlap" not in settings),
    ("random", "mixed batch", 1, "grpc"),
    ("random", "drafts, chunks and preemption", 4, "shm"),
    ("trained", "two drafts", 1, "shm"),
    ("trained", "preemption", 2, "shm"),
    ("trained", "two drafts", 2, "grpc"),
    ("trained", "chunked prefill", 4, "grpc"),
    ("random", "overlap", 2, "shm"),
    ("trained", "overlap, drafts, chunks and preemption", 2, "grpc"),
    ("trained", "overlap", 2, "collective"),
]


@dataclass(frozen=True)
class GenerationCase:
    """A model with prompts, and the tokens that transformers generates after them."""

    model: CausalLM
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GenerationCase]:
    """A function from a model's name to its case, each made once."""
    made: dict[str, GenerationCase] = {}

    def get(name: str) -> GenerationCase:
        if name not in made:
            torch.set_num_threads(1)
            model = MODELS[name](tmp_path_factory.mktemp("run"))
            prompts = (
                text_prompts(LENGTHS, EACH)
                if name.startswith("trained")
                else random_prompts(model.config, LENGTHS, EACH)
            )
            expected = generated_by_transformers(model, prompts, NEW)
            assert len({token for tokens in expected for token in tokens}) > 20  # not one token over and over
            made[name] = GenerationCase(model, prompts, expected)
        return made[name]

    return get


def said(requests: list[Sequence]) -> list[list[int]]:
    return [request.output for request in requests]


def check(case: GenerationCase, settings: str, hosts: int, channel: str, *, learned: bool) -> None:
    with engine_over(case.model, SETTINGS[settings], hosts=hosts, channel=channel) as engine:
        assert said(greedily(engine, case.prompts, NEW)) == case.expected
        assert (engine.scheduler.preemptions > 0) == ("preemption" in settings)
        drafting = SETTINGS[settings].drafts != 0
        assert (engine.stats.proposed[0] > 0) == drafting
        if learned and drafting:  # so that some drafts are right and some are wrong
            assert 0.1 < engine.stats.accepted[0] / engine.stats.proposed[0] < 1


@pytest.mark.parametrize(("model", "settings", "hosts", "channel"), COVERING, ids=str)
def test_the_tokens_are_those_of_transformers(
    case_of: Callable[[str], GenerationCase], model: str, settings: str, hosts: int, channel: str
) -> None:
    check(case_of(model), settings, hosts, channel, learned=model.startswith("trained"))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "settings", "hosts", "channel"), [case for case in ALL if case not in COVERING], ids=str
)
def test_the_tokens_are_those_of_transformers_everywhere(
    case_of: Callable[[str], GenerationCase], model: str, settings: str, hosts: int, channel: str
) -> None:
    check(case_of(model), settings, hosts, channel, learned=model.startswith("trained"))


def assert_known(requests: list[Sequence]) -> None:
    """Assert that every full page of a prompt was found in the cache.

    Of requests of one length, which begin alike and come together, the first one fills the cache.
    """
    for request in requests[::EACH]:
        assert request.cached == (len(request.prompt) - 1) // 4 * 4


@pytest.mark.parametrize("model", ["random", "trained"])
@pytest.mark.parametrize("hosts", [0, 2])
def test_a_known_prefix_changes_no_token(
    case_of: Callable[[str], GenerationCase], model: str, hosts: int
) -> None:
    case = case_of(model)
    with engine_over(case.model, EngineSettings(page_size=4), hosts=hosts, channel="shm") as engine:
        assert said(greedily(engine, case.prompts, NEW)) == case.expected
        again = greedily(engine, case.prompts, NEW)
        assert said(again) == case.expected
        assert_known(again)
        # Generated tokens are in the prefix cache as well as prompts.
        half = NEW // 2
        longer = [[*prompt, *told[:half]] for prompt, told in zip(case.prompts, case.expected, strict=True)]
        rest = greedily(engine, longer, NEW - half)
        assert said(rest) == [told[half:] for told in case.expected]
        assert_known(rest)
