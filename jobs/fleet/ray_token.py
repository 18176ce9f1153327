"""Ray's token for a command that connects to a cluster which another command of the same user embeds."""

from __future__ import annotations

import os
from pathlib import Path

_MODE = "RAY_AUTH_MODE"


def use_own_token() -> None:
    """Let Ray use the user's token, if there is one and nothing is said about it; before Ray is imported.

    A cluster that a command embeds wants it. Ray takes it by itself where it finds the cluster by itself, not
    where an address is given.
    """
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault(_MODE, "token")


__all__ = ["use_own_token"]
