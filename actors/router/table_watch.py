"""A thread that keeps a router's table up to date."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from actors.router.table_source import Tables
from errors import RaymoeError

if TYPE_CHECKING:
    from actors.router.router import Router

_log = logging.getLogger(__name__)
_POLL: Final = 2.0  # seconds of one long poll, and so at most until the thread ends after `close`
_PAUSE: Final = 0.25
"""Seconds from one question to the next at least, where it brought nothing new."""


class Watch:
    """Waits for newer tables, and has the router use them, until `close`."""

    def __init__(self, router: Router, tables: Tables) -> None:
        self._router, self._tables = router, tables
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{router.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Install nothing from now on; the thread ends with its question to the coordinator."""
        self._closed.set()

    def _run(self) -> None:
        away = False
        while not self._closed.is_set():
            began = time.monotonic()
            news = False
            try:
                news = self._ask()
                away = False
            except Exception as error:  # whatever it is: calls go on with the table that there is
                if self._closed.is_set():
                    return
                if not away:
                    level = logging.INFO if isinstance(error, RaymoeError) else logging.ERROR
                    _log.log(level, "%s: no news of expert hosts: %s", self._router.name, error)
                away = True
            if not news:
                self._closed.wait(max(0.0, began + _PAUSE - time.monotonic()))

    def _ask(self) -> bool:
        held = self._router.table
        table = self._tables.after(held.serial, held.weights, _POLL)
        if table is None or self._closed.is_set():
            return False
        return self._router.install(table)


__all__ = ["Watch"]
