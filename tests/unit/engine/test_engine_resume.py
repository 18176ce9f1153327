"""A request that another engine takes over in the middle continues with the same tokens."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.delta import Delta
from engine.engine import Engine
from engine.params import SamplingParams
from engine.sequence import Sequence
from engine.service import EngineService
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from errors import ConfigError, QueueFull
from jobs.data.tokenizer import train_tokenizer
from model.causal_lm import CausalLM
from model.config import ModelConfig

NEW = 14
PROMPT = "the cat sat on"
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 3},
    "filters": {"seed": 4, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {
        "seed": 5,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 1.0},
    "bias": {"seed": 6, "logit_bias": {65: 3.0, 70: -5.0}},
    "log probabilities": {"seed": 7, "logprobs": 3},
    "echo": {"seed": 8, "logprobs": 2, "prompt_logprobs": True},
    "min_tokens": {"seed": 9, "min_tokens": NEW},
    "ends by a token": {"temperature": 0.0, "stop_token_ids": "some", "ignore_eos": True},
    "ends by a string": {"temperature": 0.0, "stop": "some"},
    "a string not before min_tokens": {"temperature": 0.0, "stop": "some", "min_tokens": 9},
}
SETTINGS = {
    "plain": EngineSettings(drafts=0),
    "drafts": EngineSettings(pace_drafts=False),
    "chunked": EngineSettings(max_batch_tokens=5, pace_drafts=False),
    "few pages": EngineSettings(cache_tokens=80, page_size=4, pace_drafts=False),
}


@dataclass
class Parts:
    model: CausalLM
    tokenizer: Any
    end: int

    def engine(self, settings: EngineSettings | None = None) -> Engine:
        return Engine(
            TrunkWeights.of(self.model.trunk),
            self.model.experts,
            settings,
            end_of_text=[self.end],
            vocabulary=self.tokenizer.get_vocab_size(),
        )

    def prompt(self) -> list[int]:
        ids: list[int] = self.tokenizer.encode(PROMPT).ids
        return ids

    def params(self, values: dict[str, Any]) -> SamplingParams:
        """Sampling parameters; the value `some` stands for text that occurs in the middle."""
        values = {"max_tokens": NEW, **values}
        said = run(self.engine(), self.prompt(), SamplingParams(max_tokens=NEW, temperature=0.0)).output
        if values.get("stop_token_ids") == "some":
            values["stop_token_ids"] = (next(t for i, t in enumerate(said) if i > 5 and t not in said[:i]),)
        if values.get("stop") == "some":
            text = self.tokenizer.decode(said)
            values["stop"] = (text[len(text) // 2 : len(text) // 2 + 4],)
        return SamplingParams(**values)


@pytest.fixture(scope="module")
def parts() -> Parts:
    tokenizer, end = train_tokenizer(["the cat sat on the mat; ünïcödé wörds 猫 and the hat"] * 4, 290)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        num_nextn_predict_layers=1,
    )
    model = CausalLM(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return Parts(model, tokenizer, end)


def run(
    engine: Engine, prompt: list[int], params: SamplingParams, output: list[int] | None = None
) -> Sequence:
    sequence = engine.add("one", prompt, params, output or [])
    while engine.has_work:
        engine.step()
    assert engine.pool.held == 0
    return sequence


@pytest.mark.parametrize("values", PARAMS.values(), ids=PARAMS)
def test_tokens_are_the_same_wherever_it_is_cut(parts: Parts, values: dict[str, Any]) -> None:
    params, prompt = parts.params({**values, "stop": ()}), parts.prompt()
    whole = run(parts.engine(), prompt, params)
    for name, settings in SETTINGS.items():
        for cut in range(len(whole.output)):
            engine = parts.engine(settings)
            engine.add("company", prompt[:3], SamplingParams(max_tokens=NEW, seed=1))
            resumed = run(engine, prompt, params, whole.output[:cut])
            assert resumed.output == whole.output, (name, cut)
            assert resumed.finish_reason == whole.finish_reason
            if params.logprobs is not None:
                own = [at.token for at in resumed.logprobs]
                assert own == pytest.approx([at.token for at in whole.logprobs[cut:]], abs=1e-9)
            assert len(resumed.prompt_logprobs) == (0 if cut else len(whole.prompt_logprobs))


class Heard:
    """A service, and the deltas of one request at a time."""

    def __init__(self, parts: Parts, settings: EngineSettings | None = None) -> None:
        self.parts = parts
        self.engine = parts.engine(settings)
        self.service = EngineService(self.engine, parts.tokenizer, version="v1")

    def deltas(self, params: SamplingParams, output: list[int] | None = None) -> list[Delta]:
        heard: queue.Queue[Delta] = queue.Queue()
        self.service.submit("one", self.parts.prompt(), params, heard.put, output=output or ()).result(30)
        deltas = [heard.get(timeout=30)]
        while deltas[-1].finish_reason is None and deltas[-1].error is None:
            deltas.append(heard.get(timeout=30))
        return deltas


@pytest.fixture(scope="module")
def heard(parts: Parts) -> Iterator[Heard]:
    made = Heard(parts, EngineSettings(pace_drafts=False))
    yield made
    assert made.engine.pool.held == 0
    made.service.close()


def told(deltas: list[Delta]) -> tuple[str, list[int], list[float], str | None]:
    return (
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.tokens],
        [round(at.token, 9) for delta in deltas for at in delta.logprobs],
        deltas[-1].finish_reason,
    )


@pytest.mark.parametrize("values", PARAMS.values(), ids=PARAMS)
def test_what_is_told_before_and_after_a_cut_is_the_whole(
    parts: Parts, heard: Heard, values: dict[str, Any]
) -> None:
    params = parts.params(values)
    whole = heard.deltas(params)
    text, tokens, logprobs, reason = told(whole)
    for cut in range(len(whole)):
        before = whole[:cut]
        output = [token for delta in before for token in delta.tokens]
        after = heard.deltas(params, output)
        assert told(before + after) == (text, tokens, logprobs, reason), cut
        assert bool(after[0].prompt_logprobs) == (params.prompt_logprobs and not cut)
    if values.get("stop"):
        assert reason == ("length" if params.min_tokens else "stop")


def test_an_output_that_has_ended_is_refused(parts: Parts, heard: Heard) -> None:
    prompt = parts.prompt()
    for params, output in (
        (SamplingParams(max_tokens=3), [5, 6, 7]),
        (SamplingParams(max_tokens=9), [5, parts.end]),
        (SamplingParams(max_tokens=99), [5] * (64 - len(prompt))),
        (SamplingParams(max_tokens=9), [9999]),
        (SamplingParams(max_tokens=9, stop=("cat",)), parts.tokenizer.encode("the cat").ids),
    ):
        with pytest.raises(ConfigError, match="output"):
            heard.service.submit("ended", prompt, params, lambda _: None, output=output).result(30)
    assert not heard.engine.has_work


def test_who_has_begun_elsewhere_goes_before_who_has_not(parts: Parts) -> None:
    engine = parts.engine(EngineSettings(max_sequences=1))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine.add("runs", parts.prompt(), params)
    engine.step()
    for name, output in (("new", []), ("begun", [5]), ("newer", []), ("begun later", [5])):
        engine.add(name, parts.prompt(), params, output)
    assert [one.id for one in engine.scheduler.waiting] == ["begun", "begun later", "new", "newer"]


def test_a_full_queue_is_told_to_those_who_ask(parts: Parts) -> None:
    made = Heard(parts, EngineSettings(max_sequences=1))
    try:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        with pytest.raises(QueueFull, match="0 requests"):
            made.service.submit("a", parts.prompt(), params, lambda _: None, limit=0).result(30)
        made.service.submit("a", parts.prompt(), params, lambda _: None).result(30)
        made.service.cancel("a").result(30)
    finally:
        made.service.close()
