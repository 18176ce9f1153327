"""Why a gRPC peer cannot be reached, in the words of its last cause and without addresses."""

from __future__ import annotations

import re

_BEFORE_THE_CAUSE = re.compile(
    r"^(?:[A-Z_]+: )?"  # a status
    r"(?:(?:ipv4|ipv6|unix)\S*: )?"  # an address
    r"(?:Failed to connect to remote host: )?"
)


def last_cause(details: str) -> str:
    """The last cause in the details of a gRPC error: `Connection refused`; other details as they are."""
    cause = details.rpartition("last error: ")[2]
    return _BEFORE_THE_CAUSE.sub("", cause) or details


__all__ = ["last_cause"]
