"""The coordinator: control plane of a job. No rows, weights or gradients pass through it.

It knows the hosts and what they hold (`actors.coordinator.placement_changes`), in training it decides the
steps (`actors.coordinator.training_steps`), it looks after the hosts' health, in serving after their number
and balance, and it answers those who operate the job. It can be lost: hosts and routers go on without it, and
the next one begins with `state()` and with what hosts tell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from actors.coordinator.host_health import Health
from actors.coordinator.job_status import describe
from actors.coordinator.placement_changes import Elastic, Shape
from actors.coordinator.routing_tables import Published
from actors.coordinator.scaling import Autoscaler, Rebalancer
from actors.coordinator.succession import epochs_held, still_held
from actors.coordinator.training_steps import TrainingSteps
from actors.messages.coordinator_state import CoordinatorState
from actors.messages.steps import HostControl
from cluster.config import AutoscalingSettings
from cluster.membership import Event, Membership, Orders, Scaling
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError, RaymoeError, ResourceError

_LONGEST_WAIT = 60.0  # of a call that waits for news; whoever waits longer asks again
_LONGEST_REST = 5.0  # seconds after moves that failed
_MEASURED_EVERY = 1.0


class Coordinator:
    """One of a job. All methods may be called from several threads at once.

    Args:
        shape: what is placed.
        hosts: expert hosts that there should be.
        control: how to command a host.
        weights: name of the weights to begin with.
        directory: where hosts read them; empty for what a run begins with.
        moments: whether the directory has the optimizer's state too.
        step: that the weights are of, in training.
        steps: makes the steps of a training run, given the hosts; None in serving.
        dead_after: seconds of silence after which a host is taken for dead.
        autoscaling: changes the number of hosts by load, in serving; None leaves it alone.
        rebalance_below: balancedness below which experts are placed anew; None never does.
        channel: that routers reach hosts by, as `cluster.channel`; told by the status.
        state: of the coordinator before; None for a job that begins.

    Attributes:
        actor: id of the Ray actor that it runs in; empty elsewhere.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        hosts: int,
        control: Callable[[HostInfo], HostControl],
        weights: str = "",
        directory: str = "",
        moments: bool = False,
        step: int | None = None,
        steps: Callable[[Elastic], TrainingSteps] | None = None,
        dead_after: float = 5.0,
        autoscaling: AutoscalingSettings | None = None,
        rebalance_below: float | None = None,
        channel: str = "auto",
        state: CoordinatorState | None = None,
    ) -> None:
        self.actor, self._channel = "", channel
        self._weights, self._directory, self._moments, self._step = weights, directory, moments, step
        self._dead_after, self._state = dead_after, state
        self._membership = Membership(wanted=hosts, most=shape.n_experts)
        if state is not None:
            self._membership.wanted, self._membership.retiring = state.wanted, frozenset(state.leaving)
        self.elastic = Elastic(
            shape,
            self._membership,
            Published(serial=0 if state is None else state.serial + 1000),
            control,
            reloadable=steps is None,
            on_lost=self._lost,
            patience=dead_after,
        )
        self.training = None if steps is None else steps(self.elastic)
        if self.training is not None and state is not None:
            self.training.hold("the coordinator was started anew")
        self._autoscaler = None if autoscaling is None else Autoscaler(self.elastic, autoscaling)
        self._rebalancer = Rebalancer(self.elastic, rebalance_below)
        self._founding = threading.Event()  # there are weights to be placed as soon as there is a host
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="health", daemon=True)]
        if self.training is None:  # else experts move between two steps
            self._threads.append(threading.Thread(target=self._keep_in_place, name="placement", daemon=True))
        if self.training is None or shape.redundant or rebalance_below is not None:
            self._threads.append(threading.Thread(target=self._measure, name="scaling", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def steps(self) -> TrainingSteps:
        """Of a training run.

        Raises:
            ProtocolError: nothing is trained here.
        """
        if self.training is None:
            raise ProtocolError("this job serves a model; it has no training steps")
        return self.training

    @property
    def workers(self) -> int:
        """Workers that may wait here at a time."""
        return 1 if self.training is None else self.training.workers

    def register_host(self, info: HostInfo) -> None:
        """Take in a host; a repeat is fine.

        Raises:
            ProtocolError: a host of this name has been there and is gone.
        """
        self.elastic.register(info)

    def found(self, timeout: float = 0.0) -> None:
        """Place all experts on the hosts that have registered; again, nothing.

        After another coordinator it goes on with what hosts hold. That may take longer than this call.

        Raises:
            RaymoeError: what a host failed with, or there is none.
        """
        if self.elastic.versions.current is not None or self._founding.is_set():
            return
        held = epochs_held(self.elastic)
        if self._state is not None or any(held.values()):
            self._take_over(held)
            return
        self._begin(timeout)

    def table(self, weights: str | None = None, timeout: float = 0.0) -> RoutingTable:
        """The routing table of these weights (None: in use), once there is one and every expert has a host.

        Raises:
            ResourceError: that takes longer than so many seconds.
            Interrupted: experts of a training run are without a host; its workers have to join again.
        """
        if self.training is not None:
            return self.training.table()
        versions = self.elastic.versions
        found = versions.table(weights) if weights else versions.complete(min(timeout, _LONGEST_WAIT))
        if found is None:
            raise ResourceError(
                "experts are without a host"
                if weights is None
                else f"the expert hosts hold no weights {weights!r} any more"
            )
        return found

    def table_after(self, serial: int, weights: str | None, timeout: float) -> RoutingTable | None:
        """The newest table once its serial is another one; None when that takes longer."""
        return self.elastic.versions.after(serial, weights or None, min(timeout, _LONGEST_WAIT))

    def suspect(self, host: str, why: str) -> None:
        """A router cannot reach a host."""
        self.elastic.suspect(host, why)

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str]
    ) -> tuple[Orders, int]:
        """What whoever runs the hosts has to do, and how many hosts are wanted."""
        return self.elastic.orders(starting=starting, failed=failed, stopped=stopped)

    def state(self) -> CoordinatorState:
        """What the next coordinator begins with."""
        versions = self.elastic.versions
        if versions.current is None and self._state is not None:
            return self._state  # nothing has been taken over yet
        return CoordinatorState(
            wanted=self._membership.wanted,
            versions=versions.live,
            serial=versions.serial,
            leaving=self.elastic.leaving(),
        )

    def scale(self, hosts: int, timeout: float) -> Scaling:
        """Want another number of expert hosts, and wait until they are there, so many seconds at most.

        Raises:
            ConfigError: so many cannot be.
            ResourceError: it had to be given up, or another change is under way.
        """
        return self._ended(self.elastic.scale(hosts), timeout)

    def drain(self, host: str, timeout: float, *, replace: bool = False) -> Scaling:
        """Let a host give its experts away and go; see `scale`."""
        return self._ended(self.elastic.drain(host, replace=replace), timeout)

    def load(self, directory: str, name: str) -> int:
        """See `Elastic.load`."""
        return self.elastic.load(directory, name)

    def publish(self, epoch: int) -> None:
        """See `Elastic.use`."""
        self.elastic.use(epoch)

    def retire(self, keep: str = "") -> None:
        """See `Elastic.retire`."""
        self.elastic.retire(keep)

    def status(self) -> dict[str, Any]:
        """How the job stands, for people and programs that operate it."""
        return {
            **describe(self.elastic, self.training, self._channel),
            "actor": self.actor,
            "wanted": self._membership.wanted,
            "balancedness": self._rebalancer.balancedness,
            "autoscaling": None if self._autoscaler is None else self._autoscaler.last.why,
            "events": [asdict(event) for event in self.events()],
        }

    def events(self) -> Sequence[Event]:
        """What happened, oldest first, as far back as it is kept."""
        return self.elastic.events()

    def close(self) -> None:
        """Wake every waiter with an error and end the threads."""
        self._closing.set()
        if self.training is not None:
            self.training.fail("the coordinator has been closed")
        self.elastic.close()
        if self.training is not None:
            self.training.close()
        for thread in self._threads:
            thread.join()

    def _begin(self, timeout: float = 0.0) -> None:
        """Place what this job begins with."""
        self.elastic.begin(
            self._weights, self._directory, step=self._step, moments=self._moments, timeout=timeout
        )
        if self.training is not None:
            self.training.founded()

    def _take_over(self, held: dict[str, set[int]]) -> None:
        """Go on with what hosts hold; what is not whole is healed as after a loss."""
        elastic, versions = self.elastic, () if self._state is None else self._state.versions
        elastic.versions.next_epoch(above=max((e for epochs in held.values() for e in epochs), default=-1))
        if versions:
            elastic.remember(versions[-1].placement)
        self._founding.set()
        if self.training is not None:  # it brings the hosts to a common step by itself
            if self._state is None:
                self.training.interrupt("the coordinator was started anew")
            else:
                self.training.recover()
            return
        left = still_held(versions, held)
        if left:
            elastic.adopt(left)
        if versions:
            self._weights = versions[-1].name
            self._directory = versions[-1].directory or self._directory

    def _ended(self, scaling: Scaling, timeout: float) -> Scaling:
        with self.elastic.changed:
            self.elastic.changed.wait_for(
                lambda: scaling.ended is not None or scaling.failure is not None or self._closing.is_set(),
                timeout,
            )
        if scaling.failure is not None:
            raise ResourceError(
                f"the change to {scaling.target} expert hosts was given up, {scaling.before} are wanted as "
                f"before: {scaling.failure}"
            )
        return scaling

    def _lost(self, host: str, why: str) -> None:
        if self.training is not None:
            self.training.lost(host, why)

    def _watch(self) -> None:
        health = Health(self.elastic, self._dead_after)
        while not self._closing.wait(health.pause):
            health.look()

    def _measure(self) -> None:
        """Look at the hosts' load."""
        while not self._closing.wait(_MEASURED_EVERY):
            if self._autoscaler is not None:
                self._autoscaler.look()
            self._rebalancer.look()

    def _keep_in_place(self) -> None:
        """In serving: move experts whenever they are to, without a pause."""
        elastic, failures = self.elastic, 0
        while not self._closing.is_set():
            why = elastic.due()
            begins = elastic.versions.current is None and self._founding.is_set()
            if why is None and not begins:
                with elastic.changed:
                    elastic.changed.wait(0.1)
                continue
            try:
                if why is None:
                    self._begin(_LONGEST_REST)
                else:
                    elastic.reshape(why)
                failures = 0
            except RaymoeError:  # noted; tried again, less and less often
                self._closing.wait(min(0.1 * 2**failures, _LONGEST_REST))
                failures += 1


__all__ = ["Coordinator"]
