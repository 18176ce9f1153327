"""The coordinator: the control plane of a job."""

from __future__ import annotations
