"""The trunk of a training worker: everything of the model but its routed experts."""

from __future__ import annotations
