"""The engine's tokens equal plain decoding under batching, chunking, preemption, caching and drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from typing import Literal

import pytest
import torch

from engine.engine import Engine
from engine.few_rows.batch import collect_few
from engine.params import SamplingParams
from engine.sequence import Sequence
from engine.settings import EngineSettings
from engine.weights import TrunkWeights
from errors import ConfigError
from model.causal_lm import CausalLM
from model.config import ModelConfig

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
}
NEW = 20

SHAPES = {
    "plain": {},
    "direct queries, halves rotated": {"q_lora_rank": None, "rope_interleave": False},
    "one module": {"num_nextn_predict_layers": 1},
    "three modules": {"num_nextn_predict_layers": 3},
    "parallel modules": {"num_nextn_predict_layers": 2, "mtp_mode": "parallel"},
    "products apart": {"kv_lora_rank": 48, "v_head_dim": 2, "qk_nope_head_dim": 2},
    "odd latent": {"kv_lora_rank": 15},
    "no shared experts": {"n_shared_experts": 0, "num_nextn_predict_layers": 1},
    "groups by one expert": {"group_score_experts": 1, "n_routed_experts": 16},
    "dense layers alone": {"first_k_dense_replace": 3},
}
SETTINGS = {
    "mixed batch": EngineSettings(pace_drafts=False),
    "chunked prefill": EngineSettings(max_batch_tokens=7, pace_drafts=False),
    "preemption": EngineSettings(cache_tokens=96, page_size=4, pace_drafts=False),
    "one by one": EngineSettings(max_sequences=1, pace_drafts=False),
    "drafts where they pay": EngineSettings(),
    "no drafts": EngineSettings(page_size=4, drafts=0),
}


def build(**changes: object) -> CausalLM:
    torch.manual_seed(1)
    model = CausalLM(ModelConfig(**{**SHAPE, **changes}), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def prompts(count: int = 6, longest: int = 40) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(97) for _ in range(source.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def continued(model: CausalLM, prompt: Items[int], count: int = NEW) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def engine_of(
    model: CausalLM, settings: EngineSettings | None = None, *, end_of_text: Items[int] = ()
) -> Engine:
    return Engine(TrunkWeights.of(model.trunk), model.experts, settings, end_of_text=end_of_text)


def greedy(count: int = NEW) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0)


def run(engine: Engine, items: Items[Items[int]], params: SamplingParams | None = None) -> list[Sequence]:
    sequences = [engine.add(str(i), item, params or greedy()) for i, item in enumerate(items)]
    while engine.has_work:
        engine.step()
    assert engine.pool.held == 0
    return sequences


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_of_running_gives_the_tokens_of_plain_decoding(shape: dict[str, object]) -> None:
    model = build(**shape)
    expected = [continued(model, prompt) for prompt in prompts()]
    for name, settings in SETTINGS.items():
        engine = engine_of(model, settings)
        assert [s.output for s in run(engine, prompts())] == expected, name
        assert (engine.scheduler.preemptions > 0) == (name == "preemption"), name


def test_drafts_of_a_model_that_repeats_itself_are_accepted() -> None:
    model = build(num_nextn_predict_layers=2, mtp_mode="parallel")
    engine = engine_of(model)
    run(engine, prompts())
    assert 0 < engine.stats.accepted[0] <= engine.stats.proposed[0]
    assert engine.stats.proposed[1] == engine.stats.accepted[0] or engine.stats.proposed[1] > 0


def test_a_known_prefix_is_not_computed_again() -> None:
    model = build()
    engine = engine_of(model, EngineSettings(page_size=4))
    prompt = prompts(1, 40)[0] * 2
    first, again = run(engine, [prompt])[0], run(engine, [prompt])[0]
    longer = run(engine, [[*prompt, 5, 6, 7]])[0]
    assert again.output == first.output
    assert again.cached == (len(prompt) - 1) // 4 * 4
    assert first.cached == 0
    assert longer.cached == len(prompt) // 4 * 4
    assert longer.output == continued(model, [*prompt, 5, 6, 7])


def test_a_request_with_a_seed_gets_the_same_tokens_in_any_company_and_with_drafts() -> None:
    model = build(num_nextn_predict_layers=1)
    params = SamplingParams(max_tokens=NEW, temperature=1.0, top_p=0.9, seed=7)
    alone = run(engine_of(model, EngineSettings(drafts=0)), prompts()[:1], params)[0]
    for settings in SETTINGS.values():
        assert run(engine_of(model, settings), prompts(), params)[0].output == alone.output
    other = SamplingParams(max_tokens=NEW, temperature=1.0, top_p=0.9, seed=8)
    assert run(engine_of(model), prompts()[:1], other)[0].output != alone.output


def test_cancelled_requests_leave_nothing_behind() -> None:
    model = build(num_nextn_predict_layers=1)
    engine = engine_of(model, EngineSettings(cache_tokens=256, page_size=4, max_batch_tokens=16))
    source = random.Random(3)
    alive: list[str] = []
    for number in range(60):
        alive.append(f"r{number}")
        engine.add(alive[-1], prompts(1, 40)[0], greedy(source.randint(1, 30)))
        engine.step()
        if source.random() < 0.7:
            engine.cancel(alive.pop(source.randrange(len(alive))))
    for name in alive:
        engine.cancel(name)
    assert not engine.has_work
    assert engine.pool.held == 0
    assert engine.step() == []


def test_a_text_ends_by_its_tokens_and_not_before_min_tokens() -> None:
    model = build()
    prompt = prompts(1)[0]
    said = continued(model, prompt)
    end = said[3]
    first = said.index(end)
    engine = engine_of(model, end_of_text=[end])
    assert run(engine, [prompt])[0].output == said[: first + 1]
    held_back = SamplingParams(max_tokens=NEW, temperature=0.0, min_tokens=first + 2)
    longer = run(engine, [prompt], held_back)[0].output
    assert len(longer) > first + 1
    assert end not in longer[: first + 2]
    ignoring = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    assert run(engine, [prompt], ignoring)[0].output == said


def test_log_probabilities_are_those_of_a_full_forward_pass() -> None:
    model = build()
    prompt = prompts(1, 12)[0] * 2
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=True)
    settings = EngineSettings(max_batch_tokens=5)
    sequence = run(engine_of(model, settings), [prompt], params)[0]
    with torch.no_grad():
        logs = model(torch.tensor([prompt + sequence.output])).log_softmax(-1)[0]
    text = prompt + sequence.output
    own = [at.token for at in [*sequence.prompt_logprobs, *sequence.logprobs]]
    assert own == pytest.approx([float(logs[i, token]) for i, token in enumerate(text[1:])], abs=1e-9)
    best = sequence.logprobs[0].best
    assert [token for token, _ in best] == logs[len(prompt) - 1].topk(2).indices.tolist()


def test_other_weights_between_two_steps_go_on_with_the_same_requests() -> None:
    model, other = build(), build(rope_theta=500.0)
    engine = engine_of(model)
    prompt = prompts(1)[0]
    sequence = engine.add("a", prompt, greedy(12))
    for _ in range(5):
        engine.step()
    before = list(sequence.output)
    engine.replace(TrunkWeights.of(other.trunk), other.experts)
    while engine.has_work:
        engine.step()
    assert sequence.output[: len(before)] == before
    assert sequence.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt is empty"),
        ([1] * 128, SamplingParams(), "leaves no room"),
        ([97], SamplingParams(), r"prompt\[0\] is token 97"),
        ([1], SamplingParams(logit_bias={200: 1.0}), r"logit_bias\.200 is no token"),
        ([1], SamplingParams(stop_token_ids=(-1,)), r"stop_token_ids\[0\] is token -1"),
    ],
)
def test_what_cannot_be_run_is_refused(prompt: list[int], params: SamplingParams, message: str) -> None:
    engine = engine_of(build())
    with pytest.raises(ConfigError, match=message):
        engine.add("a", prompt, params)
    assert not engine.has_work


class Alternating:
    """A pacer that wants drafts in some stretches of steps and none in others."""

    def __init__(self, *stretches: tuple[bool, int]) -> None:
        self._plan = [wants for wants, steps in stretches for _ in range(steps)]

    def wants(self, sequences: int) -> bool:
        return self._plan.pop(0) if len(self._plan) > 1 else self._plan[0]

    def note(self, **_: object) -> None:
        pass


@pytest.mark.parametrize("mode", ["chain", "parallel"])
def test_drafts_that_were_paused_go_on_as_if_they_had_not_been(mode: Literal["chain", "parallel"]) -> None:
    model = build(num_nextn_predict_layers=2, mtp_mode=mode)
    always = engine_of(model, EngineSettings(pace_drafts=False))
    paused = engine_of(model, EngineSettings())
    paused.pacer = Alternating((True, 3), (False, 20), (True, 4), (False, 3), (True, 1))  # type: ignore[assignment]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    plain = run(engine_of(model, EngineSettings(drafts=0)), prompts()[:3], params)[0]
    made: list[dict[int, list[int]]] = []
    for engine in (always, paused):
        sequences = [engine.add(str(at), prompt, params) for at, prompt in enumerate(prompts()[:3])]
        drafts: dict[int, list[int]] = {}
        while engine.has_work:
            engine.step()
            if sequences[0].drafts:
                drafts[len(sequences[0])] = list(sequences[0].drafts)
        made.append(drafts)
        assert sequences[0].output == plain.output
    common = made[0].keys() & made[1].keys()
    assert max(common) - min(common) > 30
    assert len(made[1]) < 60
    assert all(made[0][at] == made[1][at] for at in common)


@pytest.mark.parametrize("mode", ["chain", "parallel"])
def test_drafts_while_decoding_are_those_after_reading_the_same_text(
    mode: Literal["chain", "parallel"],
) -> None:
    model = build(num_nextn_predict_layers=3, mtp_mode=mode)
    settings = EngineSettings(pace_drafts=False)
    text = prompts()[0]
    engine = engine_of(model, settings)
    sequence = engine.add("whole", text, greedy(12))
    while engine.has_work:
        engine.step()
        if engine.has_work:
            known = list(sequence.all_tokens)
            fresh = engine_of(model, settings)
            again = fresh.add("again", known[:-1], greedy())
            fresh.step()
            assert again.output == known[-1:]
            assert sequence.drafts == again.drafts


@pytest.mark.parametrize("mode", ["chain", "parallel"])
def test_no_draft_lies_beyond_the_longest_text(
    mode: Literal["chain", "parallel"], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(num_nextn_predict_layers=3, mtp_mode=mode, max_position_embeddings=32)
    last: list[int] = []
    monkeypatch.setattr(
        "engine.few_rows.runner.collect_few",
        lambda stretches, **sizes: (
            last.append(max(stretch.end for stretch in stretches)) or collect_few(stretches, **sizes)
        ),
    )
    engine = engine_of(model, EngineSettings(page_size=4, pace_drafts=False))
    (sequence,) = run(engine, [[1, 2, 3]], greedy(100))
    assert len(sequence) == 32
    assert max(last) <= 32


def test_warming_up_leaves_nothing_and_changes_nothing() -> None:
    model = build(num_nextn_predict_layers=1)
    engine = engine_of(model)
    engine.warm_up()
    assert not engine.has_work
    assert engine.pool.held == 0
    assert not engine.stats.proposed
    assert [s.output for s in run(engine, prompts())] == [continued(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_prompt_alone_is_computed_without_a_token(settings: EngineSettings, echo: bool) -> None:
    model = build(num_nextn_predict_layers=1)
    engine = Engine(TrunkWeights.of(model.trunk), model.experts, settings)
    asked = prompts(3)
    params = SamplingParams(max_tokens=0, temperature=0.0, logprobs=1, prompt_logprobs=echo)
    beside = engine.add("beside", asked[0], SamplingParams(max_tokens=NEW, temperature=0.0))
    scored = [engine.add(str(at), prompt, params) for at, prompt in enumerate(asked)]
    while engine.has_work:
        engine.step()
    assert beside.output == continued(model, asked[0])
    for sequence, prompt in zip(scored, asked, strict=True):
        assert (sequence.finish_reason, sequence.output, sequence.logprobs) == ("length", [], [])
        with torch.no_grad():
            logs = model(torch.tensor([prompt]))[0].log_softmax(-1)
        expected = [float(logs[at, token]) for at, token in enumerate(prompt[1:])] if echo else []
        assert [at.token for at in sequence.prompt_logprobs] == pytest.approx(expected, abs=1e-9)
    assert engine.pool.held == 0


def test_a_preempted_prompt_counts_no_entry_of_its_own_as_cached() -> None:
    model = build()
    engine = Engine(
        TrunkWeights.of(model.trunk), model.experts, EngineSettings(page_size=4, max_batch_tokens=8)
    )
    sequence = engine.add("one", list(range(30)), SamplingParams(max_tokens=2, temperature=0.0))
    engine.step()
    engine.step()
    engine.scheduler.restart()  # as a preemption does, the pages stay findable
    while engine.has_work:
        engine.step()
    assert sequence.cached == 0
    again = engine.add("two", list(range(30)), SamplingParams(max_tokens=1, temperature=0.0))
    while engine.has_work:
        engine.step()
    assert again.cached == 28
