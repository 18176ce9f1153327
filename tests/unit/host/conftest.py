"""What tests of hosts share: clusters of hosts that are closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.moving_cluster import MovingCluster


@pytest.fixture
def made() -> Iterator[Any]:
    clusters: list[MovingCluster] = []

    def make(*arguments: Any, **options: Any) -> MovingCluster:
        clusters.append(MovingCluster(*arguments, **options))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()
