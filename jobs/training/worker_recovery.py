"""Restores a worker's trunk at an earlier step."""

from __future__ import annotations

from dataclasses import dataclass

from actors.messages.steps import Resume
from actors.router import Router
from actors.trunk.snapshots import TrunkSnapshots
from cluster.topology import RoutingTable
from jobs.training.worker_checkpoints import WorkerCheckpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecovery:
    """Restores a worker's trunk from a snapshot in memory or from a checkpoint.

    Attributes:
        router: Connects the worker to the expert hosts.
        checkpoints: Load the trunk from disk.
        snapshots: The trunk's snapshots in memory; None with `cluster.snapshot_interval=0`.
    """

    router: Router
    checkpoints: WorkerCheckpoints
    snapshots: TrunkSnapshots | None

    def restore(self, resume: Resume, table: RoutingTable) -> None:
        """Set the routing table, and the trunk's state if the run goes back to another step."""
        self.router.set_table(table)
        if self.snapshots is not None and resume.trunk:
            self.snapshots.restore(resume.step, resume.trunk)
        elif resume.directory is not None:
            self.checkpoints.restart(resume.directory)

    def keep(self, step: int) -> None:
        """Take a snapshot of the trunk after `step` steps."""
        if self.snapshots is not None:
            self.snapshots.keep(step, self.router.table.hosts)


__all__ = ["WorkerRecovery"]
