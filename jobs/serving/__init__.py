"""A model on Ray Serve: expert hosts, coordinator, trunk replicas and the interface in front of them."""

from __future__ import annotations
