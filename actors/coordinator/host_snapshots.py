"""Snapshots of a training run in the memory of its expert hosts, and the copies that other hosts keep."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress

from torch import Tensor

from actors.coordinator.common_snapshot import DECISIONS, buddies
from actors.coordinator.host_calls import HostCalls
from actors.coordinator.placement_controller import PlacementController
from actors.messages.transfer_orders import EXPERTS, Blob
from errors import RaymoeError


class HostSnapshots:
    """Has the hosts keep snapshots of their experts. One thread at a time may call.

    Args:
        placements: The hosts and what they hold; None with experts in the workers' processes.
        interval: Steps between snapshots; 0 takes none.
        calls: Carries out calls to hosts.
    """

    def __init__(self, placements: PlacementController | None, interval: int, calls: HostCalls) -> None:
        self._placements, self._calls = placements, calls
        self._interval = 0 if placements is None else interval
        self._taken: tuple[int, dict[str, str]] = (-1, {})  # the latest: step, host -> host of its copy

    @property
    def enabled(self) -> bool:
        """Whether snapshots are taken."""
        return self._interval > 0

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after `step` steps: not before all have a copy of the latest one.

        Hosts keep the snapshots of two steps: a third one too early would leave no step that all hosts have.
        """
        return self.enabled and step % self._interval == 0 and self._copied()

    def take(
        self, step: int, bias: Tensor, *, epoch: int, commits: Mapping[str, Future[None]]
    ) -> list[tuple[str, Future[None]]]:
        """Have every host keep its state and send a copy to another host, in the background.

        Args:
            step: Optimizer steps behind the state.
            bias: `[L, E]` float32, the gates' bias at this step; every host keeps it.
            epoch: Epoch of the experts.
            commits: Host id -> its commit of the step before, which its snapshot waits for.

        Returns:
            (host id, call) of each host; a call that fails leaves the run one step less to go back to.
        """
        assert self._placements is not None
        members = self._placements.roster.hosts()
        keepers = buddies([(id, info.node) for id, (info, _) in members.items()])
        self._taken = (step, keepers)
        blob = Blob(name=DECISIONS, step=step, tensors={"bias": bias})

        def keep(id: str) -> None:
            commit, keeper, host = commits.get(id), keepers.get(id), members[id][1]
            with suppress(RaymoeError):
                if commit is not None:
                    commit.result()
                host.snapshot(step, [members[keeper][0]] if keeper is not None else [], epoch)
                host.put(blob)

        return [(id, self._calls.submit(keep, id)) for id in members]

    def _copied(self) -> bool:
        """Whether all copies of the latest snapshot have arrived, or could not be sent."""
        step, keepers = self._taken
        members = {} if self._placements is None else self._placements.roster.hosts()
        for id, keeper in keepers.items():
            with suppress(RaymoeError):
                for stored in members[id][1].inventory() if id in members else ():
                    mine = (stored.kind, stored.owner, stored.step) == (EXPERTS, id, step)
                    if mine and keeper not in stored.pushed and keeper not in stored.failed:
                        return False
        return True


__all__ = ["HostSnapshots"]
