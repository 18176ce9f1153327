"""The routing tables that a router gets from a coordinator, now and when they change."""

from __future__ import annotations

import threading

from actors.router.table_updates import CoordinatorTables
from cluster.topology import RoutingTable
from errors import ChannelError

TABLE = RoutingTable(epoch=1, hosts=(), holders=(), weights="one", serial=4)


class Client:
    """A fake client of a coordinator."""

    def __init__(self) -> None:
        self.suspects: list[tuple[str, str]] = []
        self.reporting, self.go_on = threading.Event(), threading.Event()

    def table(self, weights: str = "", timeout: float | None = 0.0) -> RoutingTable:
        assert weights == "one"
        return TABLE

    def table_after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        assert (weights, timeout) == ("one", 3.0)
        return TABLE if TABLE.serial > serial else None

    def suspect(self, host: str, why: str) -> None:
        self.suspects.append((host, why))
        self.reporting.set()
        assert self.go_on.wait(20)
        raise ChannelError("the coordinator hung up")


def test_a_coordinator_is_asked_by_serials() -> None:
    tables = CoordinatorTables(Client())
    assert tables.newest("one") is TABLE
    assert tables.after(3, "one", 3.0) is TABLE
    assert tables.after(4, "one", 3.0) is None


def test_a_suspicion_keeps_nobody_waiting() -> None:
    client = Client()
    tables = CoordinatorTables(client)
    for _ in range(3):
        tables.suspect("host-0", "hung up")
    assert client.reporting.wait(20)
    client.go_on.set()
    assert client.suspects == [("host-0", "hung up")]
