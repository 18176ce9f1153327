"""The coordinator: the control plane of a job."""

from __future__ import annotations

from actors.coordinator.coordinator import Coordinator, HostPolicy, InitialWeights

__all__ = ["Coordinator", "HostPolicy", "InitialWeights"]
