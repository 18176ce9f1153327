"""What tests of the interface share: an interface over an engine, closed at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.api_server import Served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    assert made.engine.pool.held == 0
    made.backend.chat.close()
    made.service.close()
