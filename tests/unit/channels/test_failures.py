"""What is told of a peer that gRPC cannot reach."""

from __future__ import annotations

import pytest

from channels.grpc.failures import last_cause

CONNECTING = "failed to connect to all addresses; last error: "


@pytest.mark.parametrize(
    ("details", "cause"),
    [
        (
            f"{CONNECTING}UNKNOWN: ipv4:10.0.0.7:6379: Failed to connect to remote host: Connection refused",
            "Connection refused",
        ),
        (f"{CONNECTING}UNAVAILABLE: ipv6:%5B::1%5D:5: Socket closed", "Socket closed"),
        ("Socket closed", "Socket closed"),
        ("DNS resolution failed for foo:1: no address", "DNS resolution failed for foo:1: no address"),
        (f"{CONNECTING}UNKNOWN: ", f"{CONNECTING}UNKNOWN: "),
    ],
)
def test_the_last_cause_stands_without_addresses(details: str, cause: str) -> None:
    assert last_cause(details) == cause
