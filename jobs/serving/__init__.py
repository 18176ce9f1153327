"""A model served with Ray Serve: expert hosts, coordinator, trunk replicas, and the interface."""

from __future__ import annotations
