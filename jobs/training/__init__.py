"""`raymoe train`: driver and workers of a training run."""

from __future__ import annotations
