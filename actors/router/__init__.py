"""The router: routing tables, and the calls of one MoE layer to the expert hosts."""

from __future__ import annotations

from actors.router.router import Router
from actors.router.routing import RouterSettings

__all__ = ["Router", "RouterSettings"]
