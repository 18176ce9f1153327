"""Requests that Schemathesis generates from an OpenAPI document, and checks of the answers."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from schemathesis import checks

_CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def assert_robust(schema: Any, cases: int) -> int:
    """Send up to this many requests to each operation, the same in every run; return how many were sent."""
    sent = 0
    for found in schema.get_all_operations():

        @settings(
            max_examples=cases,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.ok().as_strategy())
        def one(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=_CHECKS)

        one()
    assert sent >= cases
    return sent


__all__ = ["assert_robust"]
