"""Leases of replicas: how long they last, and when Serve is asked for another replica."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.serving.interface.replica_leases import ServeLeases
from jobs.serving.replica.held_leases import HeldLeases
from support.fakes.fake_replicas import (
    run,
)


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
