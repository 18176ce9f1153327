"""Where a router's tables come from: the coordinator, asked now or waited for."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, Final, Protocol

from cluster.topology import RoutingTable
from errors import RaymoeError

_BETWEEN: Final = 0.5  # seconds between two looks at a coordinator that has no long poll


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


class CoordinatorTables:
    """The tables of a coordinator, through its client.

    Args:
        client: a `CoordinatorClient`, which stays its owner's to close.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        # Until coordinators publish serials, all that they have is the table as it is.
        self._polls = hasattr(client, "table_after")
        self._lock = threading.Lock()
        self._reporting: set[str] = set()

    def newest(self, weights: str) -> RoutingTable:
        """See `Tables`."""
        table: RoutingTable = self._client.table(weights) if self._polls else self._client.table()
        return table

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        """See `Tables`."""
        if self._polls:
            found: RoutingTable | None = self._client.table_after(serial, weights, timeout)
            return found
        table = self.newest(weights)
        if table.serial > serial and table.weights == weights:
            return table
        threading.Event().wait(min(timeout, _BETWEEN))
        return None

    def suspect(self, host_id: str, why: str) -> None:
        """See `Tables`; told in a thread of its own, as the coordinator may be slow or gone itself."""
        if not hasattr(self._client, "suspect"):
            return
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
