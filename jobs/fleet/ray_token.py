"""Ray's authentication token for a cluster that another command of the same user has started."""

from __future__ import annotations

import os
from pathlib import Path

_MODE = "RAY_AUTH_MODE"


def use_own_token() -> None:
    """Have Ray use the user's token, if there is one and RAY_AUTH_MODE is not set; call it before importing
    Ray.

    A cluster that a command starts requires the token. Ray uses the token by itself when it finds the cluster
    by itself, but not when an address is given.
    """
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault(_MODE, "token")


__all__ = ["use_own_token"]
