"""The interface under requests that nobody would write: an answer of OpenAI's shape to all, and no failure.

Schemathesis makes them from the server's own OpenAPI document, and holds the answers against it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from test_api import Served

from jobs.api import build_api

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.service.close()


@pytest.fixture
def document(served: Served) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", build_api(lambda: served.backend))


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_as_the_document_says(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
