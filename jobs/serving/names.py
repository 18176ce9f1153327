"""The names under which Ray Serve knows a deployment and its parts."""

from __future__ import annotations

NAME = "raymoe"
"""Name of the Serve application that `raymoe serve` deploys."""

POOL = "experts"
"""Name of the pool's deployment, which `raymoe reload` calls."""

TRUNK = "trunk"
"""Name of the deployment of the trunk replicas."""

INTERFACE = "api"
"""Name of the interface's deployment."""

__all__ = ["INTERFACE", "NAME", "POOL", "TRUNK"]
