"""Which deaths and replacements of trunk replicas and interface processes are told, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

import jobs.serving.pool.process_watch
from cluster.events import Event
from errors import ChannelError
from jobs.serving.pool.process_inquiry import end_of
from jobs.serving.pool.process_losses import ProcessEnd, ProcessLosses, ProcessSigns
from jobs.serving.pool.process_watch import ProcessWatch

KILLED = ProcessEnd(why="its process ended")
ENDED = ProcessEnd(why="Ray Serve ended it", deliberate=True)


class LossScene:
    """A deployment whose processes and clock a test moves; `told` has the texts by kind, in order."""

    def __init__(self) -> None:
        self.now = 100.0
        self.losses = ProcessLosses(5.0, clock=lambda: self.now)
        self.told: list[tuple[str, str]] = []

    def start(self, name: str, *, interface: bool = False) -> None:
        self.losses.join(name, f"actor of {name}", interface=interface)
        self.losses.serve(name)

    def ask(self, name: str) -> None:
        """A question that is answered at once."""
        with self.losses.question(name):
            pass

    def look(self, ends: Mapping[str, ProcessEnd] | None = None, *answered: str) -> None:
        signs = ProcessSigns(ends=ends or {}, answered=frozenset(answered))
        self.told += [(event.kind, event.text) for event in self.losses.look(signs)]

    def wait(self, seconds: int, *asking: str) -> None:
        """Look every second, while these processes ask."""
        for _ in range(seconds):
            self.now += 1.0
            for name in asking:
                self.ask(name)
            self.look()


@pytest.fixture
def scene() -> LossScene:
    return LossScene()


def test_a_death_and_its_replacement_are_told_once(scene: LossScene) -> None:
    scene.start("a")
    scene.start("b")
    scene.look({"a": KILLED})
    scene.look({"a": KILLED})
    scene.start("c")
    scene.losses.serve("c")
    scene.start("d")  # one more than before: a scale-up
    scene.look()
    assert scene.told == [
        ("died", "trunk replica a: its process ended"),
        ("replaced", "trunk replica c serves in place of a"),
    ]


def test_what_several_processes_tell_at_a_time_is_one_event(scene: LossScene) -> None:
    for _ in range(3):
        scene.losses.note("keys", "2 are valid")
        scene.now += 0.5
    scene.losses.note("front", "2 are valid")
    scene.look()
    scene.now += 10.0
    scene.losses.note("keys", "2 are valid")  # the file has changed again
    scene.look()
    assert scene.told == [("keys", "2 are valid"), ("front", "2 are valid"), ("keys", "2 are valid")]


def test_a_fault_that_ends_within_seconds_is_told_with_its_end(scene: LossScene) -> None:
    for text in ("2 are valid", "it is gone", "it is gone", "2 are valid", "2 are valid"):
        scene.losses.note("keys", text)
        scene.now += 0.5
    scene.look()
    assert scene.told == [("keys", "2 are valid"), ("keys", "it is gone"), ("keys", "2 are valid")]


def test_a_replacement_may_serve_before_the_death_is_noticed(scene: LossScene) -> None:
    scene.start("a")
    scene.start("b")
    scene.wait(3, "a", "b")
    scene.now += 1.0
    scene.start("c")
    scene.look({"a": KILLED})
    scene.start("d")
    scene.look({"b": KILLED})
    assert scene.told == [
        ("died", "trunk replica a: its process ended"),
        ("replaced", "trunk replica c serves in place of a"),
        ("died", "trunk replica b: its process ended"),
        ("replaced", "trunk replica d serves in place of b"),
    ]


def test_interface_processes_are_told_apart_from_trunk_replicas(scene: LossScene) -> None:
    scene.start("a")
    scene.start("i", interface=True)
    scene.look({"i": KILLED, "a": KILLED})
    scene.start("j", interface=True)
    scene.look()
    assert scene.told == [
        ("died", "interface process i: its process ended"),
        ("died", "trunk replica a: its process ended"),
        ("replaced", "interface process j serves in place of i"),
    ]


def test_what_ray_serve_ends_is_not_told(scene: LossScene) -> None:
    for name in "abc":
        scene.start(name)
    scene.losses.leave("a")
    scene.look({"a": KILLED, "b": ENDED})
    scene.start("d")
    scene.look()
    assert scene.told == []


def test_nothing_is_told_once_the_deployment_shuts_down(scene: LossScene) -> None:
    scene.start("a")
    scene.losses.close()
    scene.look({"a": KILLED})
    assert scene.told == []


def test_a_process_that_hangs_is_given_up_and_may_return(scene: LossScene) -> None:
    scene.start("a")
    scene.start("b")
    scene.wait(5, "b")
    assert scene.told == []
    scene.wait(2, "b")
    assert [kind for kind, _ in scene.told] == ["died"]
    assert scene.told[0][1].startswith("trunk replica a: silent for 5 s; raise cluster.dead_after")
    scene.ask("a")
    scene.start("c")
    scene.wait(5, "a", "b", "c")
    assert scene.told[1:] == [("returned", "trunk replica a answers again")]


def test_one_that_was_given_up_is_replaced_after_ray_serve_has_ended_it(scene: LossScene) -> None:
    scene.start("a")
    scene.start("i", interface=True)
    scene.wait(6, "i")
    scene.look({"a": ENDED})
    scene.start("b")
    scene.look()
    assert [kind for kind, _ in scene.told] == ["died", "replaced"]


def test_an_open_question_is_no_silence(scene: LossScene) -> None:
    scene.start("a")
    with scene.losses.question("a"):
        scene.wait(30)
        assert scene.losses.suspects() == {}
    scene.now += 1.0
    assert scene.losses.suspects() == {"a": "actor of a"}
    assert scene.told == []


def test_a_pause_of_the_pool_is_no_silence_of_the_others(scene: LossScene) -> None:
    for name in "ab":
        scene.start(name)
    scene.look()
    scene.now += 60.0
    scene.ask("b")
    scene.look()
    assert scene.told == []
    scene.wait(4, "b")
    assert [kind for kind, _ in scene.told] == ["died"]


def test_where_nothing_is_asked_an_answer_to_ray_is_a_sign_of_life(scene: LossScene) -> None:
    for name in "ab":
        scene.start(name)
    for _ in range(60):
        scene.now += 1.0
        scene.look({}, "b", "unknown")
    assert [text.partition(":")[0] for _, text in scene.told] == ["trunk replica a"]
    scene.look({}, "a")
    assert scene.told[1:] == [("returned", "trunk replica a answers again")]


def test_a_process_that_loads_may_be_silent_and_its_death_needs_no_replacement(scene: LossScene) -> None:
    scene.start("a")
    scene.look({"a": KILLED})
    scene.losses.join("b", "actor of b", interface=False)
    scene.wait(20)
    scene.look({"b": KILLED})
    for name in "cd":
        scene.start(name)
    scene.look()
    assert scene.told == [
        ("died", "trunk replica a: its process ended"),
        ("died", "trunk replica b: its process ended before it served"),
        ("replaced", "trunk replica c serves in place of a"),
    ]


def died(reason: int) -> ActorDeathCause:
    return ActorDeathCause(actor_died_error_context=ActorDiedErrorContext(reason=reason))


def test_rays_reasons_say_what_was_deliberate() -> None:
    assert end_of(died(ActorDiedErrorContext.WORKER_DIED)) == KILLED
    assert end_of(died(ActorDiedErrorContext.NODE_DIED)) == ProcessEnd(why="its node ended")
    assert end_of(died(ActorDiedErrorContext.RAY_KILL)).deliberate
    short = ActorDeathCause()
    short.oom_context.SetInParent()
    assert "short of memory" in end_of(short).why


class FlakyRecorder:
    """A coordinator that is away now and then."""

    def __init__(self) -> None:
        self.away = False
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        if self.away:
            raise ChannelError("away")
        self.events.append(event)


@pytest.mark.parametrize("has_recorder", [True, False])
def test_the_coordinator_gets_every_event_once_it_is_there(scene: LossScene, has_recorder: bool) -> None:
    recorder, ends = FlakyRecorder(), dict[str, ProcessEnd]()
    watch = ProcessWatch(
        scene.losses, recorder if has_recorder else None, inquire=lambda suspects: ProcessSigns(ends=ends)
    )

    async def run() -> None:
        scene.start("a")
        scene.now += 1.0
        recorder.away, ends["a"] = True, KILLED
        await watch.look()
        assert [event.kind for event in watch.events] == ["died"]
        scene.start("b")
        recorder.away = False
        await watch.look()
        await watch.look()

    asyncio.run(run())
    assert [event.kind for event in watch.events] == ["died", "replaced"]
    assert recorder.events == (list(watch.events) if has_recorder else [])


def test_a_look_that_raises_does_not_end_the_watch(
    scene: LossScene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs.serving.pool.process_watch, "LOOK_SECONDS", 0.001)
    looks = 0

    def inquire(suspects: Mapping[str, str]) -> ProcessSigns:
        nonlocal looks
        looks += 1
        if looks <= 3:
            raise KeyError("nobody foresaw this")
        return ProcessSigns(ends={"a": KILLED})

    watch = ProcessWatch(scene.losses, None, inquire=inquire)

    async def run() -> None:
        scene.start("a")
        scene.now += 1.0
        watch.start()
        async with asyncio.timeout(10):
            while not watch.events.recorded:
                await asyncio.sleep(0)
        watch.stop()

    asyncio.run(run())
    assert [event.text for event in watch.events] == ["trunk replica a: its process ended"]
    (record,) = caplog.records  # told once, not at every look
    assert record.exc_text is not None
