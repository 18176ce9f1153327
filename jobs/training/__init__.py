"""`raymoe train`: the driver and the trunk workers of a training run."""

from __future__ import annotations
