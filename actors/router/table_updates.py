"""Newer routing tables: asked of the coordinator, and awaited by a thread that installs them."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Final, Protocol

from actors.router.routing import Routing, Tables
from cluster.topology import RoutingTable
from errors import RaymoeError

_log = logging.getLogger(__name__)
_POLL: Final = 2.0  # seconds of one long poll, and so at most until the thread ends after `close`
_PAUSE: Final = 0.25
"""Least seconds from one poll to the next, where it brought nothing new."""


class TableServer(Protocol):
    """The calls of a coordinator, or of a client of one, that concern routing tables."""

    def table(self, weights: str) -> RoutingTable: ...

    def table_after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None: ...

    def suspect(self, host: str, why: str) -> None: ...


class CoordinatorTables:
    """The routing tables of a coordinator; implements `actors.router.routing.Tables`.

    Args:
        client: Closed by its owner.
    """

    def __init__(self, client: TableServer) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._reporting: set[str] = set()

    def newest(self, weights: str) -> RoutingTable:
        return self._client.table(weights)

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        return self._client.table_after(serial, weights, timeout)

    def suspect(self, host_id: str, why: str) -> None:
        """Report in a thread of its own, as the coordinator may be slow or gone itself."""
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


class TableWatch:
    """A thread that waits for newer tables and installs them, until `close`.

    Args:
        name: The router's, for the log.
    """

    def __init__(self, name: str, routing: Routing, tables: Tables) -> None:
        self._name, self._routing, self._tables = name, routing, tables
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Install nothing from now on; the thread ends with its current poll."""
        self._closed.set()

    def _run(self) -> None:
        away = False
        while not self._closed.is_set():
            began = time.monotonic()
            news = False
            try:
                news = self._poll()
                away = False
            except Exception as error:  # calls go on with the table in use, whatever the error is
                if self._closed.is_set():
                    return
                if not away:
                    level = logging.INFO if isinstance(error, RaymoeError) else logging.ERROR
                    _log.log(level, "%s: no news of expert hosts: %s", self._name, error)
                away = True
            if not news:
                self._closed.wait(max(0.0, began + _PAUSE - time.monotonic()))

    def _poll(self) -> bool:
        held = self._routing.table
        table = self._tables.after(held.serial, held.weights, _POLL)
        if table is None or self._closed.is_set():
            return False
        return self._routing.install(table)


__all__ = ["CoordinatorTables", "TableWatch"]
