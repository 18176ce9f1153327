"""What a trunk replica says of its experts: which have no host, and which host does not answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.topology import HostInfo, RoutingTable
from errors import ChannelError
from jobs.serving.replica import replica
from jobs.serving.replica.replica import HostsHealth

HOSTS = tuple(HostInfo(id=f"host-{at}", addresses={"grpc": "grpc:127.0.0.1:1"}) for at in range(2))


class AnsweringHosts:
    """Clients of hosts, of which some do not answer."""

    silent: frozenset[str] = frozenset()

    def __init__(self, host: HostInfo, *, timeout: float) -> None:
        self._id = host.id

    def stats(self) -> None:
        if self._id in self.silent:
            raise ChannelError(f"expert host {self._id} cannot be reached (Connection refused)")

    def close(self) -> None:
        """Nothing is open."""


def of(hosts: tuple[HostInfo, ...], *rows: tuple[tuple[int, ...], ...]) -> Any:
    return SimpleNamespace(table=RoutingTable(epoch=1, hosts=hosts, holders=rows))


@pytest.mark.parametrize(
    ("hosts", "holders", "silent", "said"),
    [
        (HOSTS, ((0,), (1,)), "", None),
        (HOSTS[:1], ((0,), ()), "", "1 of 2 experts have no live expert host; requests wait"),
        ((), ((), ()), "", "2 of 2 experts have no live expert host; requests wait"),
        (HOSTS, ((0,), (1,)), "host-1", "expert host host-1 cannot be reached"),
    ],
)
def test_a_replica_is_well_while_every_expert_has_a_host_that_answers(
    hosts: tuple[HostInfo, ...],
    holders: tuple[tuple[int, ...], ...],
    silent: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica, "HostClient", AnsweringHosts)
    monkeypatch.setattr(AnsweringHosts, "silent", frozenset({silent}))
    found = HostsHealth(of(hosts, holders), timeout=1.0)()
    assert found is None if said is None else str(found).startswith(said)


def test_experts_in_the_replica_are_always_there() -> None:
    assert HostsHealth(None, timeout=1.0)() is None
