"""Requests continue when a replica of the trunk dies: over gRPC, with fake replicas."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from engine.params import SamplingParams
from engine.sequence import TokenLogprobs
from engine.service import Delta
from errors import ConfigError, QueueFull
from jobs.api.serving_metrics import ExpertFigures
from jobs.serving.interface.deployment_status import DeploymentStatus
from jobs.serving.interface.replica_leases import ReplicaLease, ServeLeases
from jobs.serving.interface.replicas import Replicas
from jobs.serving.interface.resumable_requests import ResumableRequests
from jobs.serving.replica.held_leases import HeldLeases
from jobs.serving.trunk_messages import delta_message, delta_of, sampling_message, sampling_params
from protos.trunk_pb2 import TrunkDelta, TrunkRequest, TrunkStatus
from protos.trunk_pb2_grpc import TrunkServicer, add_TrunkServicer_to_server

PROMPT = [5, 6, 7]
COUNT = 12
VOCABULARY = 1000
PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0)


def token(prompt: list[int], output: list[int], seed: str) -> int:
    """The next token, a function of prompt, output and seed as an engine's is."""
    return random.Random(f"{prompt}{output}{seed}").randrange(VOCABULARY)


def expected(prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(token(prompt, output, "" if params.seed is None else str(params.seed)))
    return output


class Fake(TrunkServicer):
    """A fake replica; `plan` maps a number of tokens to the fault that follows it, once."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan
        self.server: Any = None
        self._stopping: asyncio.Task[None] | None = None
        self.hung = asyncio.Event()
        self.asked: list[TrunkRequest] = []
        self.cancelled = 0
        self.status_calls = 0
        self.version = "v1"
        self.unwell = ""
        self.answered = 0  # number of status calls answered

    async def Generate(self, request: TrunkRequest, context: Any) -> None:  # type: ignore[override]
        self.asked.append(request)
        output = list(request.output)
        try:
            await self._trouble(-1, context)
            await context.write(TrunkDelta())
            while True:
                await self._trouble(len(output), context)
                output.append(token(list(request.prompt), output, request.sampling.seed))
                reason = "length" if len(output) == request.sampling.max_tokens else ""
                delta = TrunkDelta(
                    text=f"{output[-1]} ",
                    tokens=output[-1:],
                    finish_reason=reason,
                    cached=0 if request.output else 2,
                    version=self.version,
                )
                await context.write(delta)
                if reason:
                    return
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def Status(self, request: Any, context: Any) -> TrunkStatus:
        self.status_calls += 1
        if self.hung.is_set():
            await asyncio.sleep(3600)
        self.answered += 1
        return TrunkStatus(version=self.version, running=3, pages=7, unwell=self.unwell)

    def stop(self) -> asyncio.Task[None]:
        """Stop the server and end all its calls."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self.server.stop(None))
        return self._stopping

    async def _trouble(self, at: int, context: Any) -> None:
        what = self.plan.pop(at, None)
        if what == "dies":
            self.stop()
            await asyncio.sleep(3600)
        elif what == "hangs":
            self.hung.set()
            await asyncio.sleep(3600)
        elif what == "ends":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this replica ends")
        elif what == "breaks off":
            raise RuntimeError("something unforeseen")
        elif what == "refuses":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt is not to its taste")
        elif what == "is full":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "3 requests are waiting already")
        elif what == "fails":
            await context.write(TrunkDelta(error="expert host host-1 is gone"))
            await asyncio.sleep(3600)


@dataclass
class Scene:
    """Replicas in the order in which they are picked; the last one is picked from then on."""

    plans: list[dict[int, str]]
    fakes: list[Fake] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    picks: int = 0
    absent: float = 0.0
    listed: bool = False
    given_back: list[str] = field(default_factory=list)
    lost_ones: list[str] = field(default_factory=list)

    async def known(self) -> dict[str, str]:
        return {f"app#trunk#{i}": address for i, address in enumerate(self.addresses) if self.listed}

    async def take(self) -> ReplicaLease:
        if self.picks and self.absent:
            await asyncio.sleep(self.absent)
        at = min(self.picks, len(self.addresses) - 1)
        self.picks += 1
        return ReplicaLease(name=f"lease-{self.picks}", address=self.addresses[at], began=0.0)

    def give_back(self, lease: ReplicaLease) -> None:
        self.given_back.append(lease.name)

    def lost(self, lease: ReplicaLease) -> None:
        self.lost_ones.append(lease.name)

    @asynccontextmanager
    async def running(
        self, *, patience: float = 20.0, dead_after: float = 20.0
    ) -> AsyncIterator[ResumableRequests]:
        for plan in self.plans:
            fake = Fake(dict(plan))
            fake.server = grpc.aio.server()
            add_TrunkServicer_to_server(fake, fake.server)
            self.addresses.append(f"127.0.0.1:{fake.server.add_insecure_port('127.0.0.1:0')}")
            await fake.server.start()
            self.fakes.append(fake)
        self.replicas = Replicas(self, self.known, dead_after=dead_after)
        trunks = ResumableRequests(self.replicas, vocabulary=VOCABULARY, patience=patience)
        try:
            yield trunks
        finally:
            await trunks.close()
            for fake in self.fakes:
                await fake.stop()


async def heard(trunks: ResumableRequests, params: SamplingParams = PARAMS, **options: Any) -> list[Delta]:
    deltas: asyncio.Queue[Delta] = asyncio.Queue()
    await trunks.submit("one", PROMPT, params, deltas.put_nowait, **options)
    found = [await deltas.get()]
    while found[-1].finish_reason is None and found[-1].error is None:
        found.append(await deltas.get())
    await asyncio.sleep(0.01)
    assert deltas.empty()
    return found


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


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


def test_requests_that_ask_replicas_themselves_share_the_questions_and_the_replicas() -> None:
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
        async with scene.running(dead_after=0.2) as trunks:
            fake, slow = scene.fakes[0], asyncio.Event()

            async def trouble(at: int, context: Any) -> None:
                if at == 3:
                    while fake.answered < 10:  # a quarter of `dead_after` lies between two questions
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
            with pytest.raises(ConfigError, match="stop_token_ids has token"):
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


def test_a_lease_lasts_as_long_as_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.serving.replica.held_leases._IDLE_SECONDS", 0.2)

    async def check() -> None:
        leases = HeldLeases()
        lease = leases.hold("a", "there")
        assert await anext(lease) == "there"
        end = asyncio.create_task(anext(lease, None))
        for _ in range(2):  # the second one takes it over
            with leases.using("a"):
                await asyncio.sleep(0.4)
                assert not end.done()
            await asyncio.sleep(0)
            assert not end.done()
        assert await end is None
        with leases.using("a"):  # after the lease has ended, without an error
            pass
        early = leases.hold("b", "there")  # a request that ends before Serve asks for more
        assert await anext(early) == "there"
        with leases.using("b"):
            pass
        assert await anext(early, None) is None

    run(check)


def test_a_lease_without_a_request_ends() -> None:
    async def check() -> None:
        leases = HeldLeases()
        lease = leases.hold("a", "there")
        assert await anext(lease) == "there"
        leases._open["a"].patience = 0.1
        assert await asyncio.wait_for(anext(lease, None), 5) is None

    run(check)


class Handle:
    """A fake of Serve's handle; `answers` are addresses, errors, or None for silence."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.calls = 0
        self.cancelled = 0
        self.hold = self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, name: str) -> Any:
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        return Call(self, answer)


class Call:
    def __init__(self, handle: Handle, answer: Any) -> None:
        self._handle, self._answer = handle, answer

    async def __anext__(self) -> str:
        if self._answer is None:
            await asyncio.sleep(3600)
        if isinstance(self._answer, Exception):
            raise self._answer
        return str(self._answer)

    def cancel(self) -> None:
        self._handle.cancelled += 1


def test_serve_is_asked_unless_a_request_has_just_ended() -> None:
    async def check() -> None:
        now = 0.0
        handle = Handle(["a:1", "b:1", "c:1", "d:1", "e:1"])
        routes = ServeLeases(handle, clock=lambda: now)  # type: ignore[arg-type]
        first, second = await routes.take(), await routes.take()
        assert (first.address, second.address) == ("a:1", "b:1")
        routes.give_back(first)
        now = 0.4
        assert await routes.take() is first
        routes.give_back(first)
        routes.give_back(second)
        routes.lost(second)
        assert await routes.take() is first
        routes.give_back(first)
        now = 1.0
        assert (await routes.take()).address == "c:1"
        now = 10.9
        last = await routes.take()
        routes.give_back(last)
        now = 11.2
        assert await routes.take() is last
        now = 21.0
        routes.give_back(last)
        assert (await routes.take()).address == "e:1"
        assert handle.calls == 5

    run(check)


def test_serve_is_asked_again_when_a_replica_is_gone_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.serving.interface.replica_leases._ASK_AGAIN_SECONDS", 0.1)

    async def check() -> None:
        handle = Handle([RuntimeError("the actor died"), None, "a:1"])
        routes = ServeLeases(handle)  # type: ignore[arg-type]
        assert (await routes.take()).address == "a:1"
        await asyncio.sleep(0)
        assert (handle.calls, handle.cancelled) == (3, 1)
        silent = Handle([None])
        waiting = asyncio.create_task(ServeLeases(silent).take())  # type: ignore[arg-type]
        while silent.calls < 5:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        waiting.cancel()

    run(check)


def test_serve_is_asked_again_however_many_asks_a_silent_replica_has_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.serving.interface.replica_leases._ASK_AGAIN_SECONDS", 0.01)

    async def check() -> None:
        handle = Handle([*[None] * 20, "a:1"])
        assert (await ServeLeases(handle).take()).address == "a:1"  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert (handle.calls, handle.cancelled) == (21, 20)

    run(check)


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
