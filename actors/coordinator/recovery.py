"""Brings the experts of a training run back to one step that everything is known of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actors.coordinator.common_snapshot import DECISIONS, CommonSnapshot, newest_common
from actors.coordinator.placement_changes import Elastic
from actors.coordinator.transfer_plan import Work, nothing
from actors.messages.coordinator_state import PlacedWeights
from actors.messages.steps import HostControl
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError, ResourceError, is_loss

_LOST_IN_MEMORY, _LOST = 8, 16
"""Attempts that ended since a host was out of reach, before memory is given up, and before all is."""
_REFUSED_BY_MEMORY = 2
"""Attempts that hosts refused before memory is given up; one from a checkpoint follows."""
_HOST_SECONDS = 600.0  # to wait for a host when there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Where a run can be begun again when memory is lost.

    Attributes:
        directory: of a checkpoint; empty for what the run itself began with.
        step: optimizer steps behind it.
        moments: whether the optimizer's state is there too.
        bias: [L, E] float32.
    """

    directory: str
    step: int
    moments: bool
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a run goes on from.

    Attributes:
        bias: [L, E] float32, the gates' bias at this step.
        trunk: hosts that have the trunk's state of it.
        directory: a checkpoint that has it, where no host does.
    """

    step: int
    bias: Tensor
    trunk: tuple[HostInfo, ...] = ()
    directory: str | None = None


Members = dict[str, tuple[HostInfo, HostControl]]


class Recovery:
    """Of one run.

    Args:
        elastic: the hosts; None with experts in the workers' processes.
        beginning: says where the run can be begun again.
    """

    def __init__(self, elastic: Elastic | None, beginning: Callable[[], Beginning] | None) -> None:
        self._elastic, self._beginning = elastic, beginning

    def run(self) -> Restored:
        """Bring the hosts to the newest step that is kept in memory, or to a checkpoint.

        Hosts may die meanwhile: then it goes on with the others, or waits for the first new one.

        Raises:
            RaymoeError: neither memory nor a checkpoint can be read.
        """
        if self._elastic is None:
            return self._from_checkpoint(self._begin())
        lost = refused = 0
        while True:
            memory = lost < _LOST_IN_MEMORY and refused < _REFUSED_BY_MEMORY
            try:
                return self._attempt(self._elastic, memory=memory)
            except ResourceError:
                raise
            except RaymoeError as error:
                # A host has died, or memory is not what it was a moment ago.
                lost, refused = lost + is_loss(error), refused + (not is_loss(error))
                if lost > _LOST or refused > _REFUSED_BY_MEMORY:
                    raise

    def _attempt(self, elastic: Elastic, *, memory: bool) -> Restored:
        elastic.bury_the_dead("the run was interrupted")
        elastic.await_sites(_HOST_SECONDS)
        members = elastic.hosts()
        inventories = {id: host.inventory() for id, (_, host) in members.items()}
        epochs = [epoch for _, host in members.values() for epoch in host.stats().epochs]
        placement = elastic.planned(elastic.await_sites(_HOST_SECONDS), elastic.held())
        found = None
        if memory:
            shape = elastic.shape
            found = newest_common(inventories, layers=shape.layers, n_experts=shape.n_experts)
        beginning = self._begin() if found is None or self._beginning is not None else None
        if found is not None and beginning is not None and found.step < beginning.step:
            found = None
        directory = beginning.directory if found is None and beginning is not None else None
        version = PlacedWeights(
            name="",
            epoch=elastic.versions.next_epoch(above=max(epochs, default=-1)),
            directory=directory,
            placement=placement,
        )
        if found is None:
            assert beginning is not None
            work = Work(version=version, sources=nothing(placement), moments=beginning.moments)
            elastic.install(work, step=beginning.step)
            return self._from_checkpoint(beginning)
        bias = _bias_of(found, members)
        elastic.install(Work(version=version, sources=found.sources), step=found.step)
        return Restored(step=found.step, bias=bias, trunk=tuple(members[id][0] for id in found.trunk))

    def _from_checkpoint(self, beginning: Beginning) -> Restored:
        return Restored(step=beginning.step, bias=beginning.bias, directory=beginning.directory)

    def _begin(self) -> Beginning:
        if self._beginning is None:
            raise RaymoeError("no checkpoint to begin again from")
        return self._beginning()


def _bias_of(found: CommonSnapshot, members: Members) -> Tensor:
    """The gates' bias at a common step."""
    error: RaymoeError | None = None
    for id in found.decisions:
        try:
            return members[id][1].get(DECISIONS, found.step).tensors["bias"].clone()
        except RaymoeError as failed:
            error = failed
    raise ChannelError(f"no host gives the decisions of step {found.step} back: {error}")


__all__ = ["Beginning", "Recovery", "Restored"]
