"""The published versions of the weights that hosts hold, and the routing tables made of them.

Usually there is one version; while weights are being replaced there are two. Every change makes new tables
under a serial that only grows, so that a router that has missed one gets the newest, complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from actors.messages.coordinator_state import PlacedWeights
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError, ResourceError


class PublishedWeights:
    """The versions that hosts hold. Any thread may call.

    Args:
        epoch: Greatest epoch that has been used.
        serial: Serial of the tables before the first one.
    """

    def __init__(self, *, epoch: int = -1, serial: int = 0) -> None:
        self._changed = threading.Condition()
        self._live: dict[str, PlacedWeights] = {}  # the one in use last
        self._hosts: Mapping[str, HostInfo] = {}
        self._gone: set[str] = set()
        self._serial = serial
        self._epoch = epoch
        self._closed: str | None = None
        self._intact = False

    @property
    def serial(self) -> int:
        """Serial of the newest tables."""
        return self._serial

    @property
    def live(self) -> tuple[PlacedWeights, ...]:
        """The published versions, the one in use last."""
        with self._changed:
            return tuple(self._live.values())

    @property
    def current(self) -> PlacedWeights | None:
        """The version in use; None before the first one."""
        return next(reversed(self.live), None)

    @property
    def whole(self) -> bool:
        """Whether every expert of the version in use has a holder; False before the first version."""
        current = self.current
        return current is not None and current.placement.complete

    @property
    def intact(self) -> bool:
        """Whether no host was lost that the version in use is placed on; False before the first version."""
        return self._intact

    def next_epoch(self, *, above: int = -1) -> int:
        """A new epoch, greater than every epoch so far and than `above`."""
        with self._changed:
            self._epoch = max(self._epoch, above) + 1
            return self._epoch

    def publish(self, versions: Iterable[PlacedWeights], hosts: Mapping[str, HostInfo]) -> None:
        """Publish these versions, and no others; the last is the one in use.

        Args:
            versions: The versions.
            hosts: Live hosts; all others, and hosts lost since, are removed from the placements.
        """
        with self._changed:
            self._hosts = {id: info for id, info in hosts.items() if id not in self._gone}
            said = {version.name: version for version in versions}
            self._live = {name: self._without_the_gone(version) for name, version in said.items()}
            self._intact = bool(said) and list(said.values()) == list(self._live.values())
            self._epoch = max([self._epoch, *(version.epoch for version in self._live.values())])
            self._bump()

    def without(self, host: str) -> None:
        """Remove a lost host; experts that only it held have no holder now."""
        with self._changed:
            self._gone.add(host)
            if host not in self._hosts:
                return
            self._hosts = {id: info for id, info in self._hosts.items() if id != host}
            self._intact &= all(host not in version.placement.sites for version in self._live.values())
            for name, version in self._live.items():
                self._live[name] = replace(version, placement=version.placement.without(host))
            self._bump()

    def table(self, weights: str | None = None) -> RoutingTable | None:
        """The newest table of these weights, or of those in use for None; None if there is none."""
        with self._changed:
            return self._table(weights)

    def after(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        """The newest table once its serial differs from `serial`; None after `timeout` seconds.

        Raises:
            ResourceError: The coordinator has been closed.
        """
        return self._wait(
            lambda: self._serial != serial and self._table(weights) is not None, weights, timeout
        )

    def complete(self, timeout: float | None) -> RoutingTable | None:
        """The table in use once every expert has a holder; None after `timeout` seconds."""

        return self._wait(lambda: self.whole, None, timeout)

    def close(self, why: str) -> None:
        """Raise an error with this text in every waiting and every later call."""
        with self._changed:
            self._closed = why
            self._changed.notify_all()

    def _wait(
        self, wanted: Callable[[], bool], weights: str | None, timeout: float | None
    ) -> RoutingTable | None:
        with self._changed:
            found = self._changed.wait_for(lambda: self._closed is not None or wanted(), timeout)
            if self._closed is not None:
                raise ResourceError(self._closed)
            return self._table(weights) if found else None

    def _without_the_gone(self, version: PlacedWeights) -> PlacedWeights:
        placement = version.placement
        for site in placement.sites:
            placement = placement if site in self._hosts else placement.without(site)
        return replace(version, placement=placement)

    def _bump(self) -> None:
        self._serial += 1
        self._changed.notify_all()

    def _table(self, weights: str | None) -> RoutingTable | None:
        version = next(reversed(self._live.values()), None) if weights is None else self._live.get(weights)
        if version is None:
            return None
        hosts = tuple(self._hosts[id] for id in version.placement.sites if id in self._hosts)
        index = {host.id: at for at, host in enumerate(hosts)}
        if len(index) != len(version.placement.sites):
            raise ProtocolError(f"epoch {version.epoch} is placed on hosts that are not there")
        holders = tuple(
            tuple(tuple(index[id] for id in ids) for ids in row) for row in version.placement.holders
        )
        return RoutingTable(
            epoch=version.epoch,
            hosts=hosts,
            holders=holders,
            weights=version.name,
            serial=self._serial,
        )


__all__ = ["PublishedWeights"]
