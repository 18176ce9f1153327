"""What tests of the router share: hosts that fail, closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.fakes.failing_hosts import FailoverCluster


@pytest.fixture
def a_busy_machine_lets_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avoid a lost host for as long as a test takes, however slow the machine is."""
    monkeypatch.setattr("actors.router.routing._SHUNNED", 600.0)


@pytest.fixture
def made(a_busy_machine_lets_nobody_back: None) -> Iterator[Callable[..., FailoverCluster]]:
    clusters: list[FailoverCluster] = []

    def make(kind: str, n_hosts: int, replicas: int) -> FailoverCluster:
        clusters.append(FailoverCluster(kind, n_hosts, replicas))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()
