"""Requests continue when a replica of the trunk dies: over gRPC, with fake replicas."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from engine.delta import Delta
from engine.params import SamplingParams
from engine.sequence import TokenLogprobs
from errors import ConfigError, QueueFull
from jobs.api.serving_metrics import ExpertFigures
from jobs.serving.interface.deployment_status import DeploymentStatus
from jobs.serving.interface.replica_connection import ReplicaConnection
from jobs.serving.trunk_messages import delta_message, delta_of, sampling_message, sampling_params
from support.fakes.fake_replicas import (
    COUNT,
    PARAMS,
    PROMPT,
    Scene,
    expected,
    heard,
    run,
    tokens,
)


@pytest.mark.parametrize("what", ["dies", "ends", "breaks off"])
@pytest.mark.parametrize("at", range(-1, COUNT))
def test_a_request_goes_on_wherever_its_replica_is_lost(at: int, what: str) -> None:
    async def check() -> None:
        scene = Scene([{at: what}, {}])
        async with scene.running() as trunks:
            deltas = await heard(trunks, limit=5)
            assert tokens(deltas) == expected(PROMPT)
            assert "".join(d.text for d in deltas) == "".join(f"{t} " for t in expected(PROMPT))
            assert deltas[-1].finish_reason == "length"
            assert {delta.cached for delta in deltas} == {2}
            again = scene.fakes[1].asked[0]
            assert list(again.output) == expected(PROMPT)[: max(0, at)]
            # An accepted request is not refused because others wait.
            assert again.HasField("limit") == (at < 0)
            assert trunks.resumed == 1
            assert (scene.lost_ones, scene.given_back) == (["lease-1"], ["lease-2"])
            assert [fake.asked[0].lease for fake in scene.fakes] == ["lease-1", "lease-2"]

    run(check)


def test_several_losses_in_a_row_and_one_version_after_the_other() -> None:
    async def check() -> None:
        scene = Scene([{2: "dies"}, {2: "dies"}, {5: "ends"}, {9: "breaks off"}, {}])
        async with scene.running() as trunks:
            for fake in scene.fakes[2:]:
                fake.version = "v2"
            deltas = await heard(trunks)
            assert tokens(deltas) == expected(PROMPT)
            assert [delta.version for delta in deltas] == ["v1"] * 2 + ["v2"] * (COUNT - 2)

    run(check)


def test_a_replica_that_hangs_is_given_up_and_all_its_requests_go_on() -> None:
    async def check() -> None:
        scene = Scene([{4: "hangs"}, {}])
        async with scene.running(dead_after=0.5) as trunks:
            began = asyncio.get_running_loop().time()
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert 0.4 < asyncio.get_running_loop().time() - began < 5
            assert scene.fakes[0].cancelled == 1
            # A hung replica that is picked again is skipped.
            scene.picks = 0
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert len(scene.fakes[0].asked) == 1
            # It is used again when it answers.
            scene.fakes[0].hung.clear()
            scene.picks = 0
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert len(scene.fakes[0].asked) == 2

    run(check)


def test_a_watch_that_fails_in_an_unforeseen_way_gives_its_replica_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("nobody foresaw this")

    async def check() -> None:
        scene = Scene([{4: "hangs"}, {}])
        async with scene.running(dead_after=0.5) as trunks:
            monkeypatch.setattr(ReplicaConnection, "status", broken)
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert scene.lost_ones == ["lease-1"]

    run(check)


def test_a_request_goes_on_although_serve_names_the_replica_that_hangs_for_ever() -> None:
    async def check() -> None:
        scene = Scene([{4: "hangs"}, {}], absent=3600, listed=True)
        async with scene.running(dead_after=0.5) as trunks:
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert (scene.picks, trunks.resumed) == (1, 1)
            assert scene.lost_ones == ["lease-1"]
            assert len(scene.fakes[1].asked) == 1

    run(check)


def test_a_request_begins_although_serve_names_no_replica_that_answers() -> None:
    async def check() -> None:
        scene = Scene([{}], absent=3600, listed=True)
        scene.picks = 1
        async with scene.running() as trunks:
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert scene.picks == 1

    run(check)


def test_requests_that_ask_replicas_themselves_share_the_questions_and_the_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine one answer may come before the others, and be the only one to choose from.
    monkeypatch.setattr("jobs.serving.interface.replicas._ANSWER_SECONDS", 30.0)

    async def check() -> None:
        scene = Scene([{}, {}, {}], absent=3600, listed=True)
        scene.picks = 1
        async with scene.running():
            taken = await asyncio.gather(*(scene.replicas.take() for _ in range(9)))
            assert Counter(lease.address for lease in taken) == dict.fromkeys(scene.addresses, 3)
            assert [fake.status_calls for fake in scene.fakes] == [1, 1, 1]

    run(check)


def test_a_replica_that_was_replaced_is_suspected_no_longer() -> None:
    async def check() -> None:
        scene = Scene([{3: "dies"}, {}], absent=3600, listed=True)
        async with scene.running() as trunks:
            assert tokens(await heard(trunks)) == expected(PROMPT)
            gone = scene.addresses.pop(0)  # the pool has forgotten it
            await scene.replicas.take()
            assert gone not in scene.replicas.suspects

    run(check)


def test_a_replica_that_is_slow_to_generate_and_answers_is_waited_for() -> None:
    async def check() -> None:
        scene = Scene([{}])
        async with scene.running(dead_after=1.0) as trunks:
            fake, slow = scene.fakes[0], asyncio.Event()

            async def trouble(at: int, context: Any) -> None:
                if at == 3:
                    while fake.answered < 6:  # a quarter of `dead_after` lies between two questions
                        await asyncio.sleep(0.01)
                    slow.set()

            fake._trouble = trouble  # type: ignore[method-assign]
            assert tokens(await heard(trunks)) == expected(PROMPT)
            assert slow.is_set()
            assert trunks.resumed == 0

    run(check)


def test_a_request_waits_for_a_replica_and_not_for_ever() -> None:
    async def check() -> None:
        scene = Scene([{3: "dies"}, {}], absent=0.5)
        async with scene.running() as trunks:
            assert tokens(await heard(trunks)) == expected(PROMPT)
        scene = Scene([{3: "dies"}, {}], absent=10)
        async with scene.running(patience=0.3) as trunks:
            deltas = await heard(trunks)
            assert tokens(deltas) == expected(PROMPT)[:3]
            assert "no replica of the trunk within 0.3 s" in str(deltas[-1].error)

    run(check)


def test_a_request_that_every_replica_dies_of_is_given_up() -> None:
    async def check() -> None:
        scene = Scene([{3: "ends"} for _ in range(8)])
        async with scene.running() as trunks:
            deltas = await heard(trunks)
            assert tokens(deltas) == expected(PROMPT)[:3]
            assert "in a row without a token" in str(deltas[-1].error)
            assert scene.picks == 6

    run(check)


def test_what_a_living_replica_says_is_final() -> None:
    async def check() -> None:
        scene = Scene([{4: "fails", -1: "nothing"}, {}])
        async with scene.running() as trunks:
            deltas = await heard(trunks)
            assert tokens(deltas) == expected(PROMPT)[:4]
            assert deltas[-1].error == "expert host host-1 is gone"
            scene.picks = 0
            scene.fakes[0].plan[-1] = "refuses"
            with pytest.raises(ConfigError, match="taste"):
                await heard(trunks)
            scene.picks = 0
            scene.fakes[0].plan[-1] = "is full"
            with pytest.raises(QueueFull, match="3 requests"):
                await heard(trunks)
            with pytest.raises(ConfigError, match=r"stop_token_ids\[0\] is token"):
                await heard(trunks, SamplingParams(stop_token_ids=(10**30,)))
            assert not scene.fakes[1].asked

    run(check)


def test_who_leaves_stops_the_generation_and_nobody_goes_on_with_it() -> None:
    async def check() -> None:
        scene = Scene([{4: "hangs"}, {}])
        async with scene.running() as trunks:
            deltas: asyncio.Queue[Delta] = asyncio.Queue()
            await trunks.submit("one", PROMPT, PARAMS, deltas.put_nowait)
            for _ in range(4):
                await deltas.get()
            trunks.cancel("one")
            while not scene.fakes[0].cancelled:
                await asyncio.sleep(0.01)
            trunks.cancel("one")
            assert deltas.empty()
            assert not scene.fakes[1].asked

    run(check)


def test_a_request_without_a_seed_gets_one_that_goes_with_it() -> None:
    async def check() -> None:
        scene = Scene([{4: "dies"}, {}])
        async with scene.running() as trunks:
            deltas = await heard(trunks, SamplingParams(max_tokens=COUNT))
            seeds = {fake.asked[0].sampling.seed for fake in scene.fakes}
            assert len(seeds) == 1
            assert tokens(deltas) == expected(PROMPT, SamplingParams(max_tokens=COUNT, seed=int(seeds.pop())))

    run(check)


def test_parameters_and_deltas_come_through_as_they_are() -> None:
    params = SamplingParams(
        max_tokens=7,
        min_tokens=3,
        temperature=0.7,
        top_p=0.9,
        top_k=50,
        min_p=0.1,
        seed=2**64 + 5,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.3,
        logit_bias={4: -2.5, 7: 1.0},
        stop=("a", "ü"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=True,
    )
    assert sampling_params(sampling_message(params)) == params
    assert sampling_params(sampling_message(SamplingParams())) == SamplingParams()
    at = TokenLogprobs(token=-1.25, best=[(3, -0.5), (4, -2.0)])
    first = Delta(text="a", tokens=[1, 2], logprobs=[at, at], prompt_logprobs=[at], cached=3, version="v")
    last = Delta(text="b", tokens=[3], logprobs=[at], finish_reason="stop", cached=3, version="v")
    assert delta_of(delta_message([first])) == first
    both = delta_of(delta_message([first, last]))
    assert (both.text, both.tokens, both.finish_reason) == ("ab", [1, 2, 3], "stop")
    assert both.logprobs == [at] * 3 and both.prompt_logprobs == [at]
    assert delta_of(delta_message([Delta(error="gone")])) == Delta(error="gone")


def test_health_and_figures_are_those_of_all_replicas_that_answer() -> None:
    async def check() -> None:
        scene = Scene([{}, {}])
        async with scene.running(dead_after=0.5):
            known = {f"app#trunk#{i}": address for i, address in enumerate(scene.addresses)}

            async def where() -> dict[str, str]:
                return known

            async def hosts() -> ExpertFigures | None:
                raise RuntimeError("the pool is away")

            overview = DeploymentStatus(scene.replicas, where, hosts)
            assert await overview.experts() is None
            assert await overview.health() is None
            engines = await overview.engines()
            assert {name: at.running for name, at in engines.items()} == {"0": 3, "1": 3}
            scene.fakes[1].unwell = "expert host host-1 is gone"
            assert await overview.health() == "expert host host-1 is gone"
            await scene.fakes[1].stop()
            assert await overview.health() is None
            assert list(await overview.engines()) == ["0"]
            await scene.fakes[0].stop()
            assert await overview.health() == "no replica of the trunk answers"

    run(check)
