"""The coordinator: the control plane of a job. No rows, weights or gradients pass through it.

It knows the hosts (`actors.coordinator.host_roster`) and places experts on them
(`actors.coordinator.placement_controller`). In training it decides the steps
(`actors.coordinator.training_steps`); in serving it scales and rebalances the hosts. It may be lost: hosts
and routers continue without it, and the next coordinator begins with `state()` and what the hosts report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from actors.coordinator.failure_detector import FailureDetector
from actors.coordinator.host_roster import HostRoster, steady
from actors.coordinator.job_status import describe, doing
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.policy import HostPolicy, InitialWeights
from actors.coordinator.routing_tables import PublishedWeights
from actors.coordinator.scaling import Autoscaler, Rebalancer
from actors.coordinator.training_steps import TrainingSteps
from actors.coordinator.transfer_plan import PlacementSpec
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.host_control import HostControl
from actors.messages.job_identity import JobIdentity
from cluster.events import Event
from cluster.membership import Membership, Orders, Scaling, Stage
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError, RaymoeError, ResourceError

_LONGEST_WAIT = 60.0  # seconds that a call waits for a table; the caller repeats it
_LONGEST_PAUSE = 5.0  # seconds after moves that failed
_MEASURED_EVERY = 1.0  # seconds
_SERIALS_SKIPPED = 1000
"""A new coordinator's tables have serials above all that the one before it can have published since its state
was saved."""


class Coordinator:
    """The coordinator of a job. All methods may be called from several threads at the same time.

    Args:
        spec: What is placed on the hosts.
        policy: Number of hosts, and thresholds for acting on them.
        control: Opens a client of a host.
        initial: The weights that the job begins with.
        steps: Makes the steps of a training run, given the placements; None in serving.
        state: State of the coordinator before this one; None for a job that begins.

    Attributes:
        actor: Id of the Ray actor that the coordinator runs in; empty elsewhere.
        job: What the job is called.
        roster: The expert hosts.
        placements: Changes which hosts hold which experts.
        training: The steps of a training run; None in serving.
    """

    def __init__(
        self,
        spec: PlacementSpec,
        policy: HostPolicy,
        *,
        control: Callable[[HostInfo], HostControl],
        initial: InitialWeights | None = None,
        steps: Callable[[PlacementController], TrainingSteps] | None = None,
        state: CoordinatorState | None = None,
    ) -> None:
        self.actor, self.job = "", JobIdentity()
        self._policy, self._initial, self._state = policy, initial or InitialWeights(), state
        membership = Membership(wanted=policy.hosts, most=spec.n_experts)
        published = PublishedWeights()
        if state is not None:
            membership.wanted, membership.retiring = state.wanted, frozenset(state.leaving)
            published = PublishedWeights(serial=state.serial + _SERIALS_SKIPPED)
        self.roster = HostRoster(
            membership, published, control, on_lost=self._on_lost, patience=policy.dead_after
        )
        self.placements = PlacementController(self.roster, spec, reloadable=steps is None)
        self.placements.reloads = 0 if state is None else state.reloads
        self.training = None if steps is None else steps(self.placements)
        if self.training is not None and state is not None:
            self.training.hold("the coordinator was restarted")
        self._autoscaler = (
            None if policy.autoscaling is None else Autoscaler(self.placements, policy.autoscaling)
        )
        self._rebalancer = Rebalancer(self.placements, policy.rebalance_below)
        self._placing = threading.Event()  # weights are to be placed as soon as there is a host
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._detect_failures, name="health", daemon=True)]
        if self.training is None:  # in training experts move between two steps
            self._threads.append(threading.Thread(target=self._move_when_due, name="placement", daemon=True))
        if self.training is None or spec.redundant or policy.rebalance_below is not None:
            self._threads.append(threading.Thread(target=self._measure, name="scaling", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def steps(self) -> TrainingSteps:
        """The steps of a training run.

        Raises:
            ProtocolError: The job serves a model.
        """
        if self.training is None:
            raise ProtocolError("this job serves a model; it has no training steps")
        return self.training

    @property
    def workers(self) -> int:
        """Workers whose calls may wait here at the same time."""
        return 1 if self.training is None else self.training.workers

    def register_host(self, info: HostInfo) -> None:
        """Add a host; a repeat does nothing.

        Raises:
            ProtocolError: A host of this name was here before and is gone.
        """
        self.roster.register(info)

    def place_experts(self, timeout: float = 0.0) -> None:
        """Place all experts on the hosts that have registered; a repeat does nothing.

        After another coordinator it continues with what hosts hold, which may take longer than this call.

        Args:
            timeout: Seconds to wait for a host.

        Raises:
            RaymoeError: A host failed, or there is none.
        """
        if self.placements.published.current is not None or self._placing.is_set():
            return
        held = self.placements.epochs_held()
        if self._state is not None or any(held.values()):
            self._take_over(held)
            return
        self._place_initial_weights(timeout)

    def table(self, weights: str | None = None, timeout: float = 0.0) -> RoutingTable:
        """The routing table of these weights (None: those in use), once every expert has a host.

        Raises:
            ResourceError: There is none within `timeout` seconds.
            Interrupted: Experts of a training run are without a host; its workers have to join again.
        """
        if self.training is not None:
            return self.training.table()
        published = self.placements.published
        found = published.table(weights) if weights else published.complete(min(timeout, _LONGEST_WAIT))
        if found is None:
            raise ResourceError(
                "experts are without a host"
                if weights is None
                else f"the expert hosts hold no weights {weights!r} any more"
            )
        return found

    def table_after(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        """The newest routing table once its serial differs from `serial`; None after `timeout` seconds."""
        return self.placements.published.after(serial, weights or None, min(timeout, _LONGEST_WAIT))

    def suspect(self, host: str, why: str) -> None:
        """Check a host that a router cannot reach."""
        self.roster.suspect(host, why)

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str], lacking: str = ""
    ) -> tuple[Orders, int]:
        """Hosts to start and to stop, and the number of hosts wanted; see `HostRoster.orders`."""
        return self.roster.orders(starting=starting, failed=failed, stopped=stopped, lacking=lacking)

    def state(self) -> CoordinatorState:
        """State that the next coordinator continues from."""
        published = self.placements.published
        if published.current is None and self._state is not None:
            return self._state  # this coordinator has not taken over yet
        return CoordinatorState(
            wanted=self.roster.wanted,
            versions=published.live,
            serial=published.serial,
            leaving=self.roster.leaving(),
            reloads=self.placements.reloads,
        )

    def scale(self, hosts: int, timeout: float, *, why: str = "") -> Scaling:
        """Change the number of expert hosts, and wait at most `timeout` seconds until the change is done.

        Args:
            why: Reason of an automatic change, which is refused while another one is under way; empty when
                an operator asks for it.

        Raises:
            ConfigError: Fewer than one host, or more hosts than experts of a layer.
            ResourceError: The change was refused, it failed, or another one has taken its place.
        """
        return self._await_end(self.roster.scale(hosts, why=why), timeout)

    def drain(self, host: str, timeout: float, *, replace: bool = False) -> Scaling:
        """Retire one host once its experts are elsewhere, and wait as `scale` does.

        When a scale takes the place of the drain, the host leaves nevertheless, and that is waited for.

        Args:
            replace: Start another host in its place; otherwise the job has one host less.
        """
        return self._await_end(self.roster.drain(host, replace=replace), timeout, drained=host)

    def status(self) -> dict[str, Any]:
        """State of the job, for people and programs that operate it."""
        return {
            **describe(self.placements, self.training, self._policy.channel),
            "actor": self.actor,
            "job": asdict(self.job),
            "wanted": self.roster.wanted,
            "lacking": self.roster.lacking,
            "balancedness": self._rebalancer.balancedness,
            "autoscaling": None if self._autoscaler is None else self._autoscaler.last.why,
            "events": [asdict(event) for event in self.events()],
        }

    def doing(self) -> str:
        """What the job does, in a few words."""
        return doing(self.placements, self.training)

    def events(self) -> Sequence[Event]:
        """The recorded events, oldest first; only the latest are kept."""
        return self.roster.events()

    def close(self) -> None:
        """Raise an error in every waiting call, and end the threads."""
        self._closing.set()
        if self.training is not None:
            self.training.fail("the coordinator has been closed")
        self.roster.close()
        if self.training is not None:
            self.training.close()
        for thread in self._threads:
            thread.join()

    def _place_initial_weights(self, timeout: float = 0.0) -> None:
        initial = self._initial
        self.placements.begin(
            initial.name, initial.directory, step=initial.step, moments=initial.moments, timeout=timeout
        )
        if self.training is not None:
            self.training.placed()

    def _take_over(self, held: Mapping[str, set[int]]) -> None:
        """Continue with what hosts hold; experts that are missing are replaced as after a loss.

        Args:
            held: Host id -> epochs that it holds.
        """
        versions = () if self._state is None else self._state.versions
        newest = max((epoch for epochs in held.values() for epoch in epochs), default=-1)
        self.placements.published.next_epoch(above=newest)
        if versions:
            self.placements.remember(versions[-1].placement)
        self._placing.set()
        if self._state is not None:
            self.roster.note("restarted", "the coordinator was lost; another one goes on in its place")
        if self.training is not None:  # recovery brings the hosts to a common step
            if self._state is None:
                self.training.interrupt("the coordinator was restarted")
            else:
                self.training.recover()
            return
        self.placements.adopt(versions, held)
        if versions:
            last = versions[-1]
            directory = last.directory or self._initial.directory
            self._initial = replace(self._initial, name=last.name, directory=directory)

    def _await_end(self, scaling: Scaling, timeout: float, drained: str | None = None) -> Scaling:
        """Wait for the end of a change, or of the host `drained` where a scale replaced its drain."""

        def is_over() -> bool:
            if scaling.superseded and drained is not None:
                return drained not in self.roster.leaving()
            return scaling.ended is not None or scaling.failure is not None

        with self.roster.changed:
            self.roster.changed.wait_for(lambda: is_over() or self._closing.is_set(), timeout)
            stage = self.roster.stages().get(drained or "")
            failed, wanted, last = scaling.failure, self.roster.wanted, self.roster.scaling
        if scaling.superseded and drained is not None:
            if stage in (None, Stage.LEAVING):
                ended = steady() if stage is None else None
                return replace(scaling, target=wanted, ended=ended, failure=None)
            failed = f"expert host {drained} stays: {last.failure if last is not None else failed}"
        if failed is not None:
            raise ResourceError(
                f"the change to {scaling.target} expert hosts was given up, {wanted} are wanted: {failed}"
            )
        return scaling

    def _on_lost(self, host: str, why: str) -> None:
        if self.training is not None:
            self.training.lost(host, why)

    def _detect_failures(self) -> None:
        """Thread: ping the hosts."""
        detector = FailureDetector(self.roster, self._policy.dead_after)
        while not self._closing.wait(detector.pause):
            detector.look()

    def _measure(self) -> None:
        """Thread: measure the hosts' load, and scale or rebalance by it."""
        while not self._closing.wait(_MEASURED_EVERY):
            if self._autoscaler is not None:
                self._autoscaler.look()
            self._rebalancer.look()

    def _move_when_due(self) -> None:
        """Thread, in serving: move experts whenever a move is due; requests go on meanwhile."""
        placements, failures = self.placements, 0
        while not self._closing.is_set():
            why = placements.due()
            begins = placements.published.current is None and self._placing.is_set()
            if why is None and not begins:
                with self.roster.changed:
                    self.roster.changed.wait(0.1)
                continue
            try:
                if why is None:
                    self._place_initial_weights(_LONGEST_PAUSE)
                else:
                    placements.reshape(why)
                failures = 0
            except RaymoeError:  # recorded as an event; the pauses between attempts grow
                self._closing.wait(min(0.1 * 2**failures, _LONGEST_PAUSE))
                failures += 1


__all__ = ["Coordinator", "HostPolicy", "InitialWeights"]
