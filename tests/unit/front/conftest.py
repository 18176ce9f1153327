"""Two fronts that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from support.fronted_app import (
    KEY,
    Fronted,
    free_port,
    fronted,
)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    """A front that needs a key and has a port for metrics."""
    folder = tmp_path_factory.mktemp("front")
    metrics = free_port()
    with fronted(folder, keys=(KEY, "second-key"), change=lambda p: replace(p, metrics_port=metrics)) as made:
        yield made


@pytest.fixture(scope="module")
def open_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    """A front without keys, with short times."""
    limits = {"header_timeout": 0.5, "stall_timeout": 1.0, "idle_timeout": 1.0}
    with fronted(tmp_path_factory.mktemp("open"), **limits) as made:
        yield made
