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

FRONT = "front"
"""Name of the front's deployment."""

HEAD = "node:__internal_head__"
"""A resource of Ray's head node. Pool, coordinator, interface and front run there, as Serve's controller
does, so that they do not depend on other nodes."""

__all__ = ["FRONT", "HEAD", "INTERFACE", "NAME", "POOL", "TRUNK"]
