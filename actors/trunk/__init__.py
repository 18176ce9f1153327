"""The trunk of a training worker: everything of the model but its routed experts."""

from __future__ import annotations

from actors.trunk.trunk import TrunkWorker

__all__ = ["TrunkWorker"]
