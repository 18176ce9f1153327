"""The leases on a trunk replica: calls of Ray Serve that stay open as long as requests use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_UNUSED_SECONDS = 15.0  # before a lease's first request
_IDLE_SECONDS = 1.0  # after a lease's last request


@dataclass(slots=True)
class HeldLease:
    """One lease.

    Attributes:
        requests: Number of requests that use it.
        patience: Seconds that it stays open without a request.
        changed: Set when a request begins or ends.
    """

    requests: int = 0
    patience: float = _UNUSED_SECONDS
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class HeldLeases:
    """All leases on this replica, by name.

    Serve counts its own calls to balance them, to scale, and to keep a replica alive until its requests have
    ended. So each running request has one such call, a lease; a request that comes soon after another one has
    ended takes over its lease.
    """

    def __init__(self) -> None:
        self._open: dict[str, HeldLease] = {}

    async def hold(self, name: str, address: str) -> AsyncGenerator[str, None]:
        """Yield the address, and return when no request has used the lease for some time."""
        lease = self._open.setdefault(name, HeldLease())
        try:
            yield address
            while True:
                lease.changed.clear()
                async with asyncio.timeout(None if lease.requests else lease.patience):
                    await lease.changed.wait()
        except TimeoutError:
            return
        finally:
            self._open.pop(name, None)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Use a lease for one request; if the lease has ended, Serve does not count the request."""
        lease = self._open.get(name, HeldLease())
        lease.requests += 1
        lease.changed.set()
        try:
            yield
        finally:
            lease.requests -= 1
            lease.patience = _IDLE_SECONDS
            lease.changed.set()


__all__ = ["HeldLease", "HeldLeases"]
