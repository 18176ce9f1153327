"""The processes of a cluster: expert host, router, trunk and coordinator as plain classes, and their actors.

Import each from its package or module (`from actors.router import Router`); only `actors.remote` needs Ray.
"""

from __future__ import annotations

__all__: list[str] = []
