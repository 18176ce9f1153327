"""What a job is called, for its operators."""

from __future__ import annotations

from dataclasses import dataclass

NAMESPACE, COORDINATOR = "raymoe", "coordinator-"
"""Namespace of the coordinators' actors in Ray, and the prefix of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """What a job is called.

    Attributes:
        id: Unique among jobs; the same for every coordinator of the job.
        name: Name of the run's directory, or of the served model.
        cluster: Address of the Ray cluster.
    """

    id: str = ""
    name: str = ""
    cluster: str = ""


__all__ = ["COORDINATOR", "NAMESPACE", "JobIdentity"]
