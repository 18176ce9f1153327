"""A change of weights over several replicas: the orders to each, and the handling of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errors import CheckpointError, ProtocolError, ResourceError
from jobs.api.backend import Limits
from jobs.chat.chat_renderer import ChatRenderer
from jobs.chat.chat_template import ChatTemplate
from jobs.serving.interface.chat_template_exchange import ChatTemplateExchange
from jobs.serving.pool.rollout import Rollout
from jobs.serving.version_follower import Follower
from jobs.serving.versions import ReplicaState, WeightsVersion

pytestmark = pytest.mark.timeout(60)
OLD = WeightsVersion(epoch=0, directory="/old", name="old")
NEW = WeightsVersion(epoch=1, directory="/new", name="new")
LATEST = WeightsVersion(epoch=2, directory="/latest", name="latest")


class FakeExchanger:
    """An exchanger that records its calls; its exchanges wait for a gate."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.used, self.held = OLD, None
        self.broken: str | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.exchanged_when: set[str] = set()

    async def prepare(self, version: WeightsVersion) -> None:
        if self.broken:
            raise CheckpointError(self.broken)
        self.held = version

    async def exchange(self, version: WeightsVersion) -> None:
        await self.gate.wait()
        assert self.held == version
        self.used, self.held = version, None

    def forget(self) -> None:
        self.held = None


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0)


@asynccontextmanager
async def replica(rollout: Rollout, name: str, loaded: asyncio.Event | None = None) -> Any:
    weights = FakeExchanger(rollout)
    weights.used = rollout.join(name)

    async def report(standing: ReplicaState) -> None:
        rollout.report(name, standing)

    async def load() -> FakeExchanger:
        if loaded is not None:
            await loaded.wait()
        return weights

    follower = Follower("run", weights.used, ask=lambda known: rollout.ask(name, known), report=report)
    loading = asyncio.create_task(load())
    task = asyncio.create_task(follower.follow(loading))
    try:
        yield weights
    finally:
        task.cancel()
        loading.cancel()
        rollout.leave(name)
        await asyncio.gather(task, loading, return_exceptions=True)


def play(scene: Callable[[Rollout, AsyncExitStack], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            await scene(Rollout("run", OLD), stack)

    asyncio.run(run())


def test_all_get_it_ready_before_one_uses_it() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        replicas = [await stack.enter_async_context(replica(rollout, name)) for name in "abc"]
        assert rollout.replicas == 3
        await rollout.prepare(NEW)
        assert [one.held for one in replicas] == [NEW] * 3
        assert [one.used for one in replicas] == [OLD] * 3
        assert rollout.uses == OLD
        await rollout.exchange()
        assert [one.used for one in replicas] == [NEW] * 3
        assert rollout.uses == NEW
        await rollout.prepare(LATEST)
        await rollout.exchange()
        assert [one.used for one in replicas] == [LATEST] * 3

    play(scene)


def test_the_exchange_ends_when_the_last_has_made_it() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        quick = await stack.enter_async_context(replica(rollout, "quick"))
        slow = await stack.enter_async_context(replica(rollout, "slow"))
        await rollout.prepare(NEW)
        slow.gate.clear()
        exchange = asyncio.create_task(rollout.exchange())
        await until(lambda: quick.used == NEW)
        assert not exchange.done()
        slow.gate.set()
        await exchange
        assert slow.used == NEW

    play(scene)


def test_one_that_cannot_makes_all_drop_it_and_the_next_attempt_is_free() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        good = await stack.enter_async_context(replica(rollout, "good"))
        bad = await stack.enter_async_context(replica(rollout, "bad"))
        bad.broken = "layer 3 is missing"
        with pytest.raises(ResourceError, match="replica bad cannot load it: layer 3 is missing"):
            await rollout.prepare(NEW)
        await until(lambda: good.held is None)
        assert (good.used, bad.used, rollout.uses) == (OLD, OLD, OLD)
        bad.broken = None
        await rollout.prepare(LATEST)
        await rollout.exchange()
        assert (good.used, bad.used) == (LATEST, LATEST)

    play(scene)


def test_a_replica_that_is_loading_is_waited_for() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(replica(rollout, "there"))
        loaded = asyncio.Event()
        late = await stack.enter_async_context(replica(rollout, "late", loaded))
        assert late.used == OLD
        prepare = asyncio.create_task(rollout.prepare(NEW))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not prepare.done()
        loaded.set()
        await prepare
        await rollout.exchange()
        assert late.used == NEW

    play(scene)


def test_a_replica_that_joins_before_the_exchange_comes_along() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(replica(rollout, "there"))
        await rollout.prepare(NEW)
        late = await stack.enter_async_context(replica(rollout, "late"))
        assert late.used == OLD
        await rollout.exchange()
        assert late.used == NEW
        after = await stack.enter_async_context(replica(rollout, "after"))
        assert after.used == NEW

    play(scene)


def test_the_interface_takes_part_and_is_no_replica(tmp_path: Path) -> None:
    async def scene() -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        for directory in (old, new):
            directory.mkdir()
            (directory / "chat_template.jinja").write_text(f"{directory.name}: {{{{ messages[0].content }}}}")
        first = WeightsVersion(epoch=0, directory=str(old), name="old")
        second = WeightsVersion(epoch=1, directory=str(new), name="new")
        rollout = Rollout("run", first)
        # As much of a backend as a template is exchanged in.
        backend: Any = SimpleNamespace(chat=ChatRenderer(ChatTemplate.from_directory(old)), limits=Limits())
        exchanger = ChatTemplateExchange(backend, "old")
        templates: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        templates.set_result(exchanger)

        async def report(standing: ReplicaState) -> None:
            rollout.report("api", replace(standing, interface=True))

        rollout.join("api")
        rollout.join("trunk")
        rollout.report("trunk", ReplicaState(uses=0, address="127.0.0.1:1"))
        follower = Follower("run", first, ask=lambda known: rollout.ask("api", known), report=report)
        following = asyncio.create_task(follower.follow(templates))
        await until(lambda: rollout.replicas == 1)
        assert rollout.trunks == {"trunk": "127.0.0.1:1"}
        rollout.leave("trunk")
        await rollout.prepare(second)
        assert (await backend.chat.render([{"content": "hi"}]), exchanger.version) == ("old: hi", "old")
        await rollout.exchange()
        assert (await backend.chat.render([{"content": "hi"}]), exchanger.version) == ("new: hi", "new")
        (new / "chat_template.jinja").write_text("{{ broken")
        with pytest.raises(ResourceError, match="chat template"):
            await rollout.prepare(WeightsVersion(epoch=2, directory=str(new), name="newer"))
        assert exchanger.version == "new"
        following.cancel()
        exchanger.close()

    asyncio.run(scene())


def test_a_deployment_is_closed_when_every_interface_has_no_request_left() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(replica(rollout, "trunk"))
        for name in ("api 1", "api 2"):
            rollout.join(name)
            rollout.report(name, ReplicaState(uses=0, interface=True))
        assert not (await rollout.ask("api 1", -1)).closing
        closing = asyncio.create_task(rollout.close())
        await asyncio.sleep(0)
        assert (await rollout.ask("api 1", 0)).closing
        rollout.drained("api 1")
        await asyncio.sleep(0)
        assert not closing.done()
        rollout.leave("api 2")  # its process has ended
        await closing
        rollout.abandon()
        assert (await rollout.ask("api 1", -1)).closing

    play(scene)


def test_a_replica_that_is_silent_for_too_long_holds_nobody_up() -> None:
    async def scene() -> None:
        now = 0.0
        rollout = Rollout("run", OLD, patience=10.0, clock=lambda: now)
        rollout.join("dead")
        async with replica(rollout, "alive") as alive:
            prepare = asyncio.create_task(rollout.prepare(NEW))
            await until(lambda: alive.held == NEW)
            assert not prepare.done()
            now = 11.0
            rollout.report("alive", ReplicaState(uses=0, ready=1))
            attend = asyncio.create_task(rollout.attend("alive"))
            await rollout.attend("dead")
            await prepare
            assert rollout.replicas == 1
            assert not attend.done()
        await asyncio.wait_for(attend, 20)

    asyncio.run(scene())


def test_what_a_replica_missed_it_does_later() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        async with replica(rollout, "a"):
            await rollout.prepare(NEW)
            await rollout.exchange()
        follower_of_old = FakeExchanger(rollout)
        rollout.join("b")

        async def report(standing: ReplicaState) -> None:
            rollout.report("b", standing)

        async def there() -> FakeExchanger:
            return follower_of_old

        follower = Follower("run", OLD, ask=lambda known: rollout.ask("b", known), report=report)
        task = asyncio.create_task(follower.follow(there()))
        await until(lambda: follower_of_old.used == NEW)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    play(scene)


def test_a_replica_whose_pool_is_another_says_so_and_keeps_its_weights() -> None:
    async def scene() -> None:
        rollout = Rollout("another run", NEW)
        weights = FakeExchanger(rollout)

        async def report(standing: ReplicaState) -> None:
            raise AssertionError("an orphan reports nothing")

        async def there() -> FakeExchanger:
            return weights

        follower = Follower("run", OLD, ask=lambda known: rollout.ask("a", known), report=report)
        await asyncio.wait_for(follower.follow(there()), 20)
        assert follower.orphaned
        assert weights.used == OLD

    asyncio.run(scene())


def test_nothing_is_exchanged_that_was_not_prepared() -> None:
    async def scene(rollout: Rollout, stack: AsyncExitStack) -> None:
        with pytest.raises(ProtocolError, match="prepare one first"):
            await rollout.exchange()

    play(scene)
