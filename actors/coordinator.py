"""The coordinator: control plane of a job. No rows, weights or gradients pass through it.

It knows the hosts and what they hold (`actors.elastic`), in training it decides the steps
(`actors.training_steps`), it looks after the hosts' health, and it answers those who operate the job. It can
be lost: hosts and routers go on without it, and the next one begins with `state()` and with what hosts tell.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.elastic import Elastic, Shape, nothing
from actors.published import Placed, Published
from actors.steps import HostControl
from actors.training_steps import TrainingSteps
from cluster.membership import Event, Membership, Orders, Scaling
from cluster.placement import Placement, plan
from cluster.topology import HostInfo, RoutingTable
from errors import ProtocolError, RaymoeError, ResourceError

_PER_DEATH = 4  # times that a host is asked before it is taken for dead
_LONGEST_WAIT = 60.0  # of a call that waits for news; whoever waits longer asks again


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a coordinator that takes over begins with.

    Attributes:
        wanted: hosts that there should be.
        versions: what hosts held, as far as was known.
    """

    wanted: int
    versions: tuple[Placed, ...]
    serial: int

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> State:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            wanted=values["wanted"],
            serial=values["serial"],
            versions=tuple(
                Placed(
                    name=one["name"],
                    epoch=one["epoch"],
                    directory=one["directory"],
                    placement=Placement(
                        sites=tuple(one["placement"]["sites"]),
                        holders=tuple(tuple(map(tuple, row)) for row in one["placement"]["holders"]),
                    ),
                )
                for one in values["versions"]
            ),
        )


class Coordinator:
    """One of a job. All methods may be called from several threads at once.

    Args:
        shape: what is placed.
        hosts: expert hosts that there should be.
        control: how to command a host.
        weights: name of the weights to begin with.
        directory: where hosts read them; empty for what a run begins with.
        steps: makes the steps of a training run, given the hosts; None in serving.
        dead_after: seconds of silence after which a host is taken for dead.
        state: of the coordinator before; None for a job that begins.
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
        state: State | None = None,
    ) -> None:
        self._weights, self._directory, self._moments, self._step = weights, directory, moments, step
        self._dead_after = dead_after
        self._state = state
        self._membership = Membership(wanted=hosts if state is None else state.wanted, most=shape.n_experts)
        versions = Published(serial=0 if state is None else state.serial + 1000)
        self.elastic = Elastic(
            shape,
            self._membership,
            versions,
            control,
            reloadable=steps is None,
            on_lost=self._lost,
        )
        self.training = None if steps is None else steps(self.elastic)
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="health", daemon=True)]
        if self.training is None:
            self._threads.append(threading.Thread(target=self._keep_in_place, name="placement", daemon=True))
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
        """Take in a host, which holds nothing yet; a repeat is fine.

        Raises:
            ProtocolError: a host of this name has been there and is gone.
        """
        self.elastic.register(info)

    def found(self, timeout: float = 0.0) -> None:
        """Place all experts on the hosts that have registered; again, nothing.

        Raises:
            RaymoeError: what a host failed with, or there is none.
        """
        elastic = self.elastic
        if elastic.versions.current is not None:
            return
        if self._state is not None:
            self._take_over(self._state)
            return
        sites = elastic.await_sites(timeout)
        placement = plan(
            sites,
            n_layers=len(elastic.shape.layers),
            n_experts=elastic.shape.n_experts,
            n_group=elastic.shape.n_group,
            replicas=elastic.shape.replicas,
            redundant=elastic.shape.redundant,
        )
        version = Placed(
            name=self._weights,
            epoch=elastic.versions.next_epoch(),
            directory=self._directory,
            placement=placement,
        )
        elastic.install(version, nothing(placement), step=self._step, moments=self._moments)

    def table(self, weights: str | None = None, timeout: float = 0.0) -> RoutingTable:
        """The routing table of these weights (None: in use), once there is one and every expert has a host.

        Raises:
            ResourceError: that takes longer than so many seconds.
        """
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

    def state(self) -> State:
        """What the next coordinator begins with."""
        versions = self.elastic.versions
        return State(wanted=self._membership.wanted, versions=versions.live, serial=versions.serial)

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

    def retire(self) -> None:
        """See `Elastic.retire`."""
        self.elastic.retire()

    def status(self) -> dict[str, Any]:
        """How the job stands, for people and programs that operate it."""
        elastic, training = self.elastic, self.training
        current = elastic.versions.current
        holders = () if current is None else current.placement.holders
        copies = [len(ids) for row in holders for ids in row]
        return {
            "mode": "serve" if training is None else "train",
            "epoch": -1 if current is None else current.epoch,
            "serial": elastic.versions.serial,
            "weights": "" if current is None else current.name,
            "bias_version": 0 if training is None else training.step,
            "step": None if training is None else training.step,
            "attempt": None if training is None else training.attempt,
            "wanted": self._membership.wanted,
            "hosts": elastic.describe(),
            "replicas_min": min(copies, default=0),
            "replicas_max": max(copies, default=0),
            "pauses": []
            if training is None
            else [{"why": why, "seconds": seconds} for why, seconds in training.pauses],
            "events": [asdict(event) for event in self.events()],
        }

    def events(self) -> Sequence[Event]:
        """What happened, oldest first, as far back as it is kept."""
        with self.elastic.changed:
            return tuple(self._membership.events)

    def close(self) -> None:
        """Wake every waiter with an error and end the threads."""
        self._closing.set()
        with self.elastic.changed:
            self.elastic.changed.notify_all()
        if self.training is not None:
            self.training.close()
        self.elastic.close()
        for thread in self._threads:
            thread.join()

    def _take_over(self, state: State) -> None:
        """Go on with what hosts hold; what is not whole is put together anew."""
        elastic = self.elastic
        if self.training is not None:  # it brings the hosts to a common step by itself
            self.training.interrupt("the coordinator was started anew")
            return
        hosts = elastic.hosts()
        held = {id: set(host.stats().epochs) for id, (_, host) in hosts.items()}
        elastic.versions.next_epoch(above=max((e for epochs in held.values() for e in epochs), default=-1))
        whole = all(
            version.epoch in held.get(site, ())
            for version in state.versions
            for site in version.placement.sites
        )
        if whole and state.versions:
            elastic.adopt(state.versions)
            return
        version = state.versions[-1] if state.versions else None
        self._weights = self._weights if version is None else version.name
        self._directory = self._directory if version is None else version.directory or ""
        self._state = None
        self.found(self._dead_after)

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
            self.training.interrupt(f"expert host {host}: {why}")

    def _watch(self) -> None:
        """Ask every host, several times before its silence counts as death."""
        pause = self._dead_after / _PER_DEATH
        while not self._closing.wait(pause):
            self.elastic.ping_all(self._dead_after)
            for id in self.elastic.silent(self._dead_after):
                self.elastic.lose(id, f"silent for {self._dead_after:g} s")

    def _keep_in_place(self) -> None:
        """In serving: move experts whenever they are to, without a pause."""
        elastic, failures = self.elastic, 0
        while not self._closing.is_set():
            why = elastic.due()
            if why is None or failures:
                with elastic.changed:
                    elastic.changed.wait(min(0.1 * 2**failures, 5.0))
            if why is None:
                failures = 0
                continue
            try:
                elastic.reshape(why)
                failures = 0
            except RaymoeError:  # noted; tried again, less and less often
                failures += 1
            except RuntimeError:
                if not self._closing.is_set():
                    raise


__all__ = ["Coordinator", "State"]
