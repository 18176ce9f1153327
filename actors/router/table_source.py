"""Where a router's tables come from: the coordinator, asked now or waited for."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from cluster.topology import RoutingTable
from errors import RaymoeError


class Tables(Protocol):
    """What a router asks of a coordinator."""

    def newest(self, weights: str) -> RoutingTable:
        """The table of a version of the weights as it is now.

        Raises:
            RaymoeError: the coordinator is away, or knows no such weights.
        """
        ...

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        """A table with a greater serial, waited for, or None where there is none within so many seconds.

        Raises:
            RaymoeError: as from `newest`.
        """
        ...

    def suspect(self, host_id: str, why: str) -> None:
        """A call to this host was lost; returns at once and never raises."""
        ...


class TableSource(Protocol):
    """Who has tables: a coordinator, or a client of one."""

    def table(self, weights: str) -> RoutingTable: ...

    def table_after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None: ...

    def suspect(self, host: str, why: str) -> None: ...


class CoordinatorTables:
    """The tables of a coordinator, through its client.

    Args:
        client: stays its owner's to close.
    """

    def __init__(self, client: TableSource) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._reporting: set[str] = set()

    def newest(self, weights: str) -> RoutingTable:
        """See `Tables`."""
        return self._client.table(weights)

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        """See `Tables`."""
        return self._client.table_after(serial, weights, timeout)

    def suspect(self, host_id: str, why: str) -> None:
        """See `Tables`; told in a thread of its own, as the coordinator may be slow or gone itself."""
        with self._lock:
            if host_id in self._reporting:
                return
            self._reporting.add(host_id)
        threading.Thread(target=self._report, args=(host_id, why), name="suspect", daemon=True).start()

    def _report(self, host_id: str, why: str) -> None:
        try:
            with suppress(RaymoeError, ValueError):  # a ValueError: the client has been closed
                self._client.suspect(host_id, why)
        finally:
            with self._lock:
                self._reporting.discard(host_id)


__all__ = ["CoordinatorTables", "Tables"]
