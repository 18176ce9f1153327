"""The calls that a training worker makes to the coordinator."""

from __future__ import annotations

from typing import Protocol

from actors.messages.steps import Resume, StepDecision, StepMetrics, StepReport
from cluster.topology import RoutingTable


class StepCoordinator(Protocol):
    """The coordinator as a worker sees it: the object itself, or a client of it."""

    def join(self, rank: int, workers: int, attempt: int, why: str) -> Resume: ...

    def table(self) -> RoutingTable: ...

    def report(self, report: StepReport) -> StepDecision: ...

    def save(self, directory: str, step: int) -> list[str]: ...

    def metrics(self, since_step: int = -1) -> list[StepMetrics]: ...


__all__ = ["StepCoordinator"]
