"""Ray's authentication token: whether this process sends and asks for it, by what its cluster does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_MODE = "RAY_AUTH_MODE"
_GIVEN = _MODE in os.environ  # by the user, whose word stands


def fit_token_mode(required: bool | None) -> None:
    """Have Ray use the user's token in this process if the cluster that it is about to join requires one.

    A process that asks for the token on a cluster that uses none gets no answers: what others send it lacks
    the token. Nothing changes if the user has set RAY_AUTH_MODE, or if this process has joined a cluster.

    Args:
        required: Whether the cluster requires it; None means unknown, and a token that is there is used.
    """
    ray = sys.modules.get("ray")
    if _GIVEN or (ray is not None and ray.is_initialized()):
        return
    if required is None:
        required = (Path.home() / ".ray" / "auth_token").is_file()
    os.environ[_MODE] = "token" if required else "disabled"
    if ray is not None:  # it has read the variable already
        ray._raylet.Config.initialize("")


__all__ = ["fit_token_mode"]
