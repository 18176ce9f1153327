"""`raymoe drain --node`: what it refuses, counts and waits for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
from typer.testing import CliRunner

from errors import ChangeUnderWay, ChannelError, ResourceError
from jobs.cli.app import app
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


HEAD, FIRST, SECOND = "a" * 56, "b" * 56, "c" * 56


def actor(name: str, node: str, id: str = "", kind: str = "", state: str = "ALIVE") -> dict[str, Any]:
    """An actor of Ray Serve's class `name`, or with `kind` a named one of another class."""
    return {
        "ActorID": id or f"{name} on {node[:1]}",
        "ActorClassName": kind or f"ServeReplica:{name}",
        "Name": name if kind else "",
        "State": state,
        "Address": {"NodeID": node},
    }


SERVING = [actor("raymoe:experts", HEAD), actor("raymoe:api", HEAD), actor("raymoe:trunk", HEAD, "t0")]
COORDINATOR = actor("coordinator-1a2b", HEAD, kind="CoordinatorProcess")
ELSEWHERE = [actor("raymoe:trunk", FIRST, "t1"), actor("raymoe:trunk", FIRST, "t2")]


class FakeRay:
    """A fake Ray cluster: its nodes, and its actors before and after it has accepted a drain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.drained: list[str] = []
        described = [
            {
                "NodeID": node,
                "Alive": True,
                "Resources": {"node:__internal_head__": 1.0} if node == HEAD else {},
            }
            for node in nodes
        ]
        dead = {"NodeID": "d" * 56, "Alive": False, "Resources": {}}
        monkeypatch.setattr(node_drain.ray, "nodes", lambda: [*described, dead])
        monkeypatch.setattr(node_drain, "on_cluster", lambda *_, **__: nullcontext())
        monkeypatch.setattr(node_drain, "seen_coordinators", lambda: ([], []))
        monkeypatch.setattr(node_drain, "actors", self._actors)
        monkeypatch.setattr(node_drain, "_refuse_newcomers", lambda node, _: self.drained.append(node))

    def _actors(self) -> dict[str, dict[str, Any]]:
        return dict(enumerate(self.after if self.drained else self.before))  # type: ignore[arg-type]


def drain(node: str) -> Any:
    return CliRunner().invoke(app, ["drain", "--node", node, "--timeout", "0"])


@pytest.mark.parametrize(
    ("nodes", "there", "said"),
    [
        ([HEAD], [*SERVING, COORDINATOR], "only node and holds the pool and interface of raymoe and a job's"),
        ([HEAD], [], "only node: nothing can move elsewhere"),
        ([HEAD, FIRST], SERVING, "head node and holds the pool and interface of raymoe, which end with it"),
        ([HEAD, FIRST], [COORDINATOR], "head node and holds a job's coordinator, which end with it"),
        ([HEAD, FIRST], [actor("mine:api", HEAD)], "head node and holds the interface of mine"),
    ],
)
def test_a_node_that_a_deployment_needs_is_refused_before_anything_changes(
    nodes: list[str], there: list[dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeRay(monkeypatch, *nodes)
    cluster.before = [*there, *ELSEWHERE]
    result = drain("aa")
    assert (result.exit_code, result.stdout, cluster.drained) == (2, "", [])
    assert said in result.stderr and "or end the deployment" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_other_nodes_are_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeRay(monkeypatch, HEAD, FIRST, SECOND)
    cluster.before = [*SERVING, *ELSEWHERE, COORDINATOR]
    cluster.after = [*SERVING, COORDINATOR, *(actor("raymoe:trunk", SECOND, f"t{n}") for n in (3, 4))]
    result = drain("bb")
    assert (result.exit_code, cluster.drained) == (0, [FIRST])
    assert result.stdout.startswith("no expert host and 2 trunk replicas were moved in ")
    assert "ended" not in result.stdout


def test_a_head_node_without_a_deployment_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeRay(monkeypatch, HEAD, FIRST)
    cluster.before = [actor("raymoe:experts", HEAD, state="DEAD"), *ELSEWHERE]
    assert drain("aa").exit_code == 0
    assert cluster.drained == [HEAD]


def test_only_trunk_replicas_with_another_in_their_place_count_as_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeRay(monkeypatch, HEAD, FIRST, SECOND)
    cluster.before = [*SERVING, *ELSEWHERE, actor("other:model", FIRST)]
    cluster.after = [*SERVING, actor("raymoe:trunk", SECOND, "t3"), actor("other:model", SECOND)]
    result = drain("bb")
    assert "no expert host and 1 trunk replica were moved in" in result.stdout
    assert result.stdout.endswith("s; 1 trunk replica ended without another in its place\n")


@pytest.mark.parametrize(
    ("node", "said"),
    [("ffff", "no Ray node ffff is alive"), ("bb", "2 Ray nodes have an id that begins with bb")],
)
def test_a_node_that_cannot_be_meant_is_an_input_error(
    node: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeRay(monkeypatch, HEAD, FIRST, "bb" + SECOND[2:])
    result = drain(node)
    assert (result.exit_code, cluster.drained) == (2, [])
    assert said in result.stderr
