"""How a fleet carries out the coordinator's orders: hosts without room, and hosts not wanted any more."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import jobs.fleet.fleet
from actors.messages.coordinator_state import CoordinatorState
from cluster.config import ClusterConfig
from cluster.membership import Orders
from cluster.topology import HostInfo
from errors import ChangeUnderWay
from jobs.fleet.fleet import Fleet
from jobs.fleet.fleet_actors import HostActor

STATE = CoordinatorState(wanted=1, versions=(), serial=0)


class OrderingCoordinator:
    """A coordinator that gives one order again and again, and records what it is told."""

    def __init__(self) -> None:
        self.orders_given = Orders(start=0, stop=())
        self.told: list[tuple[int, str]] = []

    def orders(self, *, starting: int, lacking: str, **_: Any) -> tuple[Orders, int, CoordinatorState]:
        self.told.append((starting, lacking))
        return self.orders_given, 1, STATE


class ClusterWithRoom:
    """A fleet over one node without actors, whose free CPUs and clock the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.now = 0.0, 100.0
        self.lost: set[str] = set()
        self.coordinator = OrderingCoordinator()
        monkeypatch.setattr(jobs.fleet.fleet, "free_resources", lambda: {"here": {"CPU": self.free}})
        monkeypatch.setattr(jobs.fleet.fleet, "unreachable", lambda nodes: nodes & self.lost)
        monkeypatch.setattr(jobs.fleet.fleet.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Fleet, "_start_host", self._start)
        monkeypatch.setattr(jobs.fleet.fleet, "kill", lambda actor: None)
        self.fleet = Fleet(ClusterConfig(), coordinator=None, host=None)  # type: ignore[arg-type]
        self.fleet._client = self.coordinator  # type: ignore[assignment]

    def _start(self, node: str) -> None:
        id = f"host-{self.fleet._next}"
        self.fleet._next += 1
        self.fleet._hosts[id] = HostActor(None, None, id, self.now, node)

    def look(self, seconds: float = 0.0) -> list[str]:
        """Carry out the orders after some seconds; the hosts that have not registered."""
        self.now += seconds
        self.fleet._obey()
        return [id for id, host in self.fleet._hosts.items() if host.info is None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ClusterWithRoom:
    return ClusterWithRoom(monkeypatch)


def test_hosts_with_room_start_at_once(cluster: ClusterWithRoom) -> None:
    cluster.free, cluster.coordinator.orders_given = 2.0, Orders(start=2, stop=())
    assert cluster.look() == ["host-0", "host-1"]
    cluster.coordinator.orders_given = Orders(start=0, stop=())
    cluster.look()
    assert cluster.coordinator.told == [(0, ""), (2, "")]


def test_a_host_that_is_late_on_a_busy_machine_is_told_with_its_load(
    cluster: ClusterWithRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.fleet.fleet.ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr("os.getloadavg", lambda: (40.2, 9.0, 3.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    cluster.free, cluster.coordinator.orders_given = 1.0, Orders(start=1, stop=())
    cluster.look()
    cluster.now += ClusterConfig().start_timeout + 1.0
    cluster.fleet._look()
    (why,) = cluster.fleet._failed.values()
    assert why.startswith(
        f"it did not start within {ClusterConfig().start_timeout:g} s: the cluster may lack"
    )
    assert why.endswith("; this machine is busy (load 40 on 2 cores): wait until it is less so")


def test_hosts_go_to_nodes_that_answer(cluster: ClusterWithRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"lost": {"CPU": 8.0}, "full": {"CPU": 0.0}, "here": {"CPU": 2.0}, "there": {"CPU": 3.0}}
    monkeypatch.setattr(jobs.fleet.fleet, "free_resources", lambda: nodes)
    cluster.lost, cluster.coordinator.orders_given = {"lost"}, Orders(start=3, stop=())
    cluster.look()
    assert [host.node for host in cluster.fleet._hosts.values()] == ["there", "here", "there"]
    cluster.coordinator.orders_given = Orders(start=1, stop=("host-0",))
    cluster.look()
    assert [host.node for host in cluster.fleet._hosts.values()] == ["here", "there", "there"]


def test_room_that_comes_within_a_moment_is_waited_for(cluster: ClusterWithRoom) -> None:
    cluster.coordinator.orders_given = Orders(start=1, stop=())
    assert cluster.look() == []
    cluster.free = 1.0  # a host that was ended has given its CPU back
    assert cluster.look(0.5) == ["host-0"]
    cluster.coordinator.orders_given = Orders(start=0, stop=())
    cluster.look()
    assert cluster.coordinator.told[-1] == (1, "")


def test_hosts_without_room_wait_and_the_coordinator_learns_why(cluster: ClusterWithRoom) -> None:
    cluster.coordinator.orders_given = Orders(start=2, stop=())
    assert cluster.look() == []
    assert cluster.look(2.0) == ["host-0", "host-1"], "an autoscaler may add nodes for them"
    cluster.coordinator.orders_given = Orders(start=0, stop=())
    cluster.look()
    starting, why = cluster.coordinator.told[-1]
    assert starting == 2
    assert "2 expert hosts wait to be started, and the Ray cluster has room for 0" in why
    for host in cluster.fleet._hosts.values():
        host.info = HostInfo(id="registered")
    cluster.look()
    assert cluster.coordinator.told[-1] == (0, "")


def test_waiting_hosts_that_are_not_wanted_any_more_end_newest_first(cluster: ClusterWithRoom) -> None:
    cluster.free, cluster.coordinator.orders_given = 3.0, Orders(start=3, stop=())
    cluster.look()
    cluster.fleet._hosts["host-1"].info = HostInfo(id="host-1")
    cluster.coordinator.orders_given = Orders(start=0, stop=(), cancel=1)
    assert cluster.look() == ["host-0"]
    assert set(cluster.fleet._hosts) == {"host-0", "host-1"}


def test_room_that_is_lacking_again_is_waited_for_from_then_on(cluster: ClusterWithRoom) -> None:
    cluster.coordinator.orders_given = Orders(start=1, stop=())
    assert cluster.look() == []
    cluster.coordinator.orders_given = Orders(start=0, stop=())
    cluster.look(60.0)
    cluster.coordinator.orders_given = Orders(start=1, stop=())
    assert cluster.look() == [], "the first request was a minute ago, and was given up"


class ScaledJob:
    """An operator's client that records automatic changes, and refuses those during other changes."""

    asked: ClassVar[list[tuple[int, str]]] = []
    refuses = True

    def __init__(self, address: str, *, timeout: float) -> None:
        pass

    def scale(self, hosts: int, *, timeout: float, why: str) -> None:
        self.asked.append((hosts, why))
        if self.refuses:
            raise ChangeUnderWay("a drain is under way")

    def close(self) -> None:
        pass


def test_a_node_that_joins_changes_the_hosts_after_a_change_that_is_under_way(
    cluster: ClusterWithRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("a", "b")]
    monkeypatch.setattr(jobs.fleet.fleet.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(jobs.fleet.fleet, "AdminClient", ScaledJob)
    monkeypatch.setattr(ScaledJob, "asked", [])
    cluster.fleet.cluster = ClusterConfig(hosts_per_node=2)

    def census() -> None:
        cluster.now += 2.0
        cluster.fleet._follow_nodes(2)

    census()
    census()
    monkeypatch.setattr(ScaledJob, "refuses", False)
    census()
    census()
    assert ScaledJob.asked == [(4, "2 Ray nodes with 2 each (cluster.hosts_per_node)")] * 3, (
        "the last is done"
    )
