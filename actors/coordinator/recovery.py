"""Recovery of a training run: brings all experts back to one step after a loss, and lets the workers go on.

The step is the newest one that is kept in the hosts' memory, or else that of a checkpoint. The experts are
installed under a new epoch, which no late request of an earlier attempt can reach.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from actors.coordinator.common_snapshot import DECISIONS, CommonSnapshot, newest_common
from actors.coordinator.host_roster import HostClients
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.run_state import RestartPoint, RunState, RunStatus
from actors.coordinator.transfer_plan import TransferPlan, no_sources
from actors.coordinator.two_phase_commit import TwoPhaseCommit
from actors.messages.coordinator_state import PlacedWeights
from errors import ChannelError, RaymoeError, ResourceError, is_loss

_LOST_IN_MEMORY, _LOST = 8, 16
"""Attempts that may end because a host was lost: before snapshots in memory are ignored, and before the
recovery fails."""
_REFUSED_BY_MEMORY = 2
"""Attempts that hosts may refuse before snapshots in memory are ignored; one from a checkpoint follows."""
_HOST_SECONDS = 600.0  # to wait for a host when there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A checkpoint that a run can restart from when no snapshot in memory is complete.

    Attributes:
        directory: The checkpoint; empty for what the run itself began with.
        step: Optimizer steps behind it.
        moments: Whether the optimizer's moments are there too.
        bias: `[L, E]` float32, the gates' bias at this step.
    """

    directory: str
    step: int
    moments: bool
    bias: Tensor


class Recovery:
    """Brings a run back to a common step after an interruption.

    Args:
        state: State of the run.
        commits: Commands the hosts.
        placements: The hosts and what they hold; None with experts in the workers' processes.
        beginning: Finds the checkpoint to restart from; None if there is none.
        note: Records an event, given its kind and its text; None records nothing.
    """

    def __init__(
        self,
        state: RunState,
        commits: TwoPhaseCommit,
        placements: PlacementController | None,
        beginning: Callable[[], Beginning] | None,
        note: Callable[[str, str], None] | None = None,
    ) -> None:
        self._note = note or (lambda kind, text: None)
        self._state, self._commits, self._placements = state, commits, placements
        self._beginning = beginning

    def start(self, why: str) -> None:
        """Recover in a thread of its own; the run is interrupted until that is done.

        Args:
            why: Reason of the interruption.
        """
        threading.Thread(target=self._run, args=(why,), name="recovery", daemon=True).start()

    def _run(self, why: str) -> None:
        began = time.monotonic()
        # A coordinator that has taken over does not know the step before the hosts are asked.
        step = None if self._state.status is RunStatus.STARTING else self._state.step
        self._note("interrupted", why if step is None else f"at step {step}: {why}")
        try:
            with self._commits.lock:  # a commit under way ends soon, with an error or with its step
                self._commits.drain()
                if self._state.begin_recovery():
                    while not self._go_on_from(self._restore(), why, began, step):
                        continue
        except Exception as error:
            self._state.end(f"{why}; and the run cannot go on from memory or a checkpoint: {error}")

    def _go_on_from(self, point: RestartPoint, why: str, began: float, before: int | None) -> bool:
        """Let the workers begin again at a step.

        Args:
            point: The step.
            why: Reason of the interruption.
            began: When it began, by `time.monotonic`.
            before: The step that was interrupted; None if it is not known.

        Returns:
            Whether they begin again; False if a host has been lost meanwhile.
        """
        with self._state.changed:
            if self._state.failure is not None:
                return True
            if not self._commits.intact:
                return False
            seconds = time.monotonic() - began
            self._state.resume(point, f"back, since {why}, at step {point.step}", seconds)
        self._note("resumed", f"at step {point.step}, {_steps_back(before, point.step)}after {seconds:.2f} s")
        with suppress(RaymoeError):
            self._commits.take_snapshot(point.step, point.bias)
        return True

    def _restore(self) -> RestartPoint:
        """Bring the hosts to the newest step that is kept in memory, or to a checkpoint.

        If hosts die during recovery, it continues with the remaining hosts, or waits for a new one if
        there is none.

        Raises:
            RaymoeError: Neither memory nor a checkpoint can be read.
        """
        if self._placements is None:
            return _from_checkpoint(self._find_beginning())
        lost = refused = 0
        while True:
            memory = lost < _LOST_IN_MEMORY and refused < _REFUSED_BY_MEMORY
            try:
                return self._attempt(self._placements, memory=memory)
            except ResourceError:
                raise
            except RaymoeError as error:
                # A host has died, or its memory has changed since its inventory.
                lost, refused = lost + is_loss(error), refused + (not is_loss(error))
                if lost > _LOST or refused > _REFUSED_BY_MEMORY:
                    raise

    def _attempt(self, placements: PlacementController, *, memory: bool) -> RestartPoint:
        """One attempt to install all experts at a common step.

        Args:
            placements: The hosts and what they hold.
            memory: Whether snapshots in memory may be used.
        """
        roster = placements.roster
        roster.probe_all("the run was interrupted")
        roster.await_sites(_HOST_SECONDS)
        members = roster.hosts()
        inventories = {id: host.inventory() for id, (_, host) in members.items()}
        epochs = [epoch for _, host in members.values() for epoch in host.stats().epochs]
        placement = placements.plan(roster.await_sites(_HOST_SECONDS), placements.held())
        found = None
        if memory:
            spec = placements.spec
            found = newest_common(inventories, layers=spec.layers, n_experts=spec.n_experts)
        beginning = self._find_beginning() if found is None or self._beginning is not None else None
        if found is not None and beginning is not None and found.step < beginning.step:
            found = None
        version = PlacedWeights(
            name="",
            epoch=placements.published.next_epoch(above=max(epochs, default=-1)),
            directory=beginning.directory if found is None and beginning is not None else None,
            placement=placement,
        )
        if found is None:
            assert beginning is not None
            sources = no_sources(placement)
            plan = TransferPlan(version=version, sources=sources, moments=beginning.moments)
            placements.install(plan, step=beginning.step)
            return _from_checkpoint(beginning)
        bias = _bias_of(found, members)
        placements.install(TransferPlan(version=version, sources=found.sources), step=found.step)
        return RestartPoint(step=found.step, bias=bias, trunk=tuple(members[id][0] for id in found.trunk))

    def _find_beginning(self) -> Beginning:
        if self._beginning is None:
            raise RaymoeError("no checkpoint to begin again from")
        return self._beginning()


def _steps_back(before: int | None, now: int) -> str:
    """How far the run went back, with a comma; empty if that is not known."""
    if before is None or before < now:
        return ""
    back = before - now
    return f"{back} step{'' if back == 1 else 's'} back, " if back else "no step is lost, "


def _from_checkpoint(beginning: Beginning) -> RestartPoint:
    return RestartPoint(step=beginning.step, bias=beginning.bias, directory=beginning.directory)


def _bias_of(found: CommonSnapshot, members: HostClients) -> Tensor:
    """The gates' bias at a common step, from the first host that returns it."""
    error: RaymoeError | None = None
    for id in found.decisions:
        try:
            return members[id][1].get(DECISIONS, found.step).tensors["bias"].clone()
        except RaymoeError as failed:
            error = failed
    raise ChannelError(f"no host gives the decisions of step {found.step} back: {error}")


__all__ = ["Beginning", "Recovery"]
