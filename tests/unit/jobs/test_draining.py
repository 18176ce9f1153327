"""`raymoe drain --node`: a host or coordinator that hangs does not stop the drain of others."""

from __future__ import annotations

import time
from typing import Any

import pytest

from errors import ChangeUnderWay, ChannelError, ResourceError
from jobs.tools import node_drain
from jobs.tools.node_drain import DrainResult, drain_hosts


class FakeAdmin:
    """A fake coordinator client: hosts, and the result of draining each."""

    def __init__(self, **ends: bool | Exception) -> None:
        self.ends = ends
        self.limits: list[float] = []

    def status(self) -> dict[str, Any]:
        hosts = [{"id": id, "node": "here"} for id in self.ends]
        return {"hosts": [*hosts, {"id": "elsewhere", "node": "there"}]}

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        assert replace
        self.limits.append(timeout)
        end = self.ends[host]
        if isinstance(end, Exception):
            raise end
        return {"done": end}


class Dead(FakeAdmin):
    def status(self) -> dict[str, Any]:
        raise ChannelError("the coordinator cannot be reached")


def test_hosts_of_the_node_are_drained() -> None:
    job = FakeAdmin(a=True, b=True)
    assert drain_hosts(job, "here", time.monotonic() + 60) == DrainResult(["a", "b"], [])
    assert all(0 < limit <= 60 for limit in job.limits)


def test_one_that_fails_does_not_keep_the_others() -> None:
    found = drain_hosts(FakeAdmin(a=ResourceError("no room"), b=False, c=True), "here", time.monotonic() + 60)
    assert found.drained == ["c"]
    assert found.failed == ["a: no room", "b still holds experts; give it more --timeout"]


def test_one_that_comes_late_is_asked_all_the_same() -> None:
    job = FakeAdmin(a=True)
    assert drain_hosts(job, "here", time.monotonic() - 1).drained == ["a"]
    assert job.limits == [0.0]


def test_a_coordinator_that_is_gone_is_told() -> None:
    assert drain_hosts(Dead(), "here", time.monotonic() + 60).failed == ["the coordinator cannot be reached"]


class Changing(FakeAdmin):
    """A job whose hosts are being changed at the time of the first drains."""

    refusals = 2

    def drain(self, host: str, *, replace: bool = False, timeout: float = 300.0) -> dict[str, Any]:
        self.refusals -= 1
        if self.refusals >= 0:
            raise ChangeUnderWay("the change to 3 expert hosts is under way")
        return super().drain(host, replace=replace, timeout=timeout)


def test_a_drain_comes_after_a_change_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_drain, "_POLL_SECONDS", 0.0)
    assert drain_hosts(Changing(a=True, b=True), "here", time.monotonic() + 60) == DrainResult(["a", "b"], [])
    late = drain_hosts(Changing(a=True), "here", time.monotonic() - 1)
    assert late.failed == ["a: the change to 3 expert hosts is under way"]
