"""What a router is told of a coordinator's tables, by one with serials and by one without."""

from __future__ import annotations

import threading
import time

from actors.tables import CoordinatorTables
from cluster import RoutingTable
from errors import ChannelError

TABLE = RoutingTable(epoch=1, hosts=(), holders=(), weights="one", serial=4)


class Old:
    """A client without serials."""

    def __init__(self) -> None:
        self.now = TABLE

    def table(self, timeout: float | None = 0.0) -> RoutingTable:
        return self.now


class New:
    """A client with them."""

    def __init__(self) -> None:
        self.suspects: list[tuple[str, str]] = []
        self.reporting, self.go_on = threading.Event(), threading.Event()

    def table(self, weights: str = "", timeout: float | None = 0.0) -> RoutingTable:
        assert weights == "one"
        return TABLE

    def table_after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        assert (weights, timeout) == ("one", 3.0)
        return TABLE if TABLE.serial > serial else None

    def suspect(self, host_id: str, why: str) -> None:
        self.suspects.append((host_id, why))
        self.reporting.set()
        assert self.go_on.wait(20)
        raise ChannelError("the coordinator hung up")


def test_a_coordinator_with_serials_is_asked_by_them() -> None:
    tables = CoordinatorTables(New())
    assert tables.newest("one") is TABLE
    assert tables.after(3, "one", 3.0) is TABLE
    assert tables.after(4, "one", 3.0) is None


def test_a_coordinator_without_is_looked_at() -> None:
    tables = CoordinatorTables(Old())
    assert tables.newest("one") is TABLE
    assert tables.after(3, "one", 3.0) is TABLE
    began = time.monotonic()
    assert tables.after(4, "one", 0.1) is None
    assert tables.after(3, "two", 0.1) is None
    assert time.monotonic() - began >= 0.2
    tables.suspect("host-0", "there is nobody to tell")


def test_a_suspicion_keeps_nobody_waiting() -> None:
    client = New()
    tables = CoordinatorTables(client)
    for _ in range(3):
        tables.suspect("host-0", "hung up")
    assert client.reporting.wait(20)
    client.go_on.set()
    assert client.suspects == [("host-0", "hung up")]
