"""The parts of a cluster: expert host, router, coordinator as plain classes, and what makes actors of them.

Import each from its package or module (`from actors.router import Router`); only `actors.remote` needs Ray.
"""

from __future__ import annotations

__all__: list[str] = []
