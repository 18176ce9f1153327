"""A trunk replica: weights, engine, router and gRPC service."""

from __future__ import annotations
