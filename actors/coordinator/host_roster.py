"""The expert hosts of a job as the coordinator reaches them: which are there, which answer, which are dead.

No host is called, and no listener is told of a loss, while a lock is held: a host that hangs blocks only the
calls to it, until it is declared dead; then its client is closed, which ends these calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor

from actors.coordinator.host_calls import HostCalls
from actors.coordinator.routing_tables import PublishedWeights
from actors.messages.host_control import HostControl
from cluster.events import Event
from cluster.membership import Membership, Orders, Scaling, Stage
from cluster.placement import Site
from cluster.topology import HostInfo
from errors import ChannelTimeout, RaymoeError, ResourceError, is_loss

_AT_ONCE = 32  # hosts that are called at the same time
_BEGAN = time.time() - time.monotonic()

HostClients = dict[str, tuple[HostInfo, HostControl]]
"""Host id -> the host's description and its client."""


def steady() -> float:
    """Seconds since the epoch by a clock that is never set: no clock change makes hosts look silent."""
    return _BEGAN + time.monotonic()


def silence(seconds: float) -> str:
    """The reason that is recorded for a host that did not answer although its process may live."""
    return (
        f"silent for {seconds:g} s, which is cluster.dead_after; raise that if the host hung for no other "
        "reason than a lack of CPU time"
    )


class HostRoster:
    """The expert hosts of a job and their clients. Any thread may call.

    Args:
        membership: State of the hosts.
        published: Versions of the weights that the hosts hold.
        control: Opens a client of a host.
        on_lost: Called with a dead host's id and the reason.
        patience: Seconds that a host has to answer after a call to it failed.
        clock: Seconds since the epoch.
        pool: Carries out calls to hosts; None starts threads.

    Attributes:
        changed: Guards the membership; notified after every change of it.
        commands: Carries out commands to hosts.
    """

    def __init__(
        self,
        membership: Membership,
        published: PublishedWeights,
        control: Callable[[HostInfo], HostControl],
        *,
        on_lost: Callable[[str, str], None] | None = None,
        patience: float = 1.0,
        clock: Callable[[], float] = steady,
        pool: Executor | None = None,
    ) -> None:
        self.published = published
        self.changed = threading.Condition()
        self.commands = HostCalls("hosts", _AT_ONCE, pool)
        # Pings have threads of their own, so that moves that take long do not delay them.
        self._pings = HostCalls("pings", _AT_ONCE, pool)
        self._membership = membership
        self._control = control
        self._on_lost = on_lost
        self._patience = patience
        self._clock = clock
        self._clients: dict[str, HostControl] = {}
        self._pinged: set[str] = set()
        self._closed = False

    def register(self, info: HostInfo) -> None:
        """Add a host; a repeat does nothing.

        Raises:
            ProtocolError: A host of this name was here before and is gone.
        """
        with self.changed:
            self._membership.register(info, self._clock())
            if info.id not in self._clients:
                self._clients[info.id] = self._control(info)
            self.changed.notify_all()

    def lose(self, id: str, why: str) -> bool:
        """Declare a host dead: routing tables omit it from now on. Returns whether it was a member."""
        with self.changed:
            was = self._membership.lose(id, why, self._clock())
        if was:
            self._remove(id, why)
        return was

    def suspect(self, id: str, why: str) -> None:
        """Ping a host that could not be reached by others, and declare it dead if it does not answer."""
        client = self._clients.get(id)
        if client is not None:
            self._ping_later(self._probe, id, client, why)

    def record_answer(self, id: str) -> None:
        """Note that a host has answered."""
        with self.changed:
            self._membership.saw(id, self._clock())

    def forgive_silence(self) -> None:
        """Count every host's silence from now on, since the coordinator itself did not listen for a while."""
        with self.changed:
            for id in self._membership.members:
                self._membership.saw(id, self._clock())

    def silent(self, patience: float) -> list[str]:
        """Hosts that have not answered for `patience` seconds."""
        with self.changed:
            return self._membership.silent(self._clock(), patience)

    def scale(self, target: int, *, why: str = "") -> Scaling:
        """Change the number of hosts that the job should have, in place of a change that is under way.

        Args:
            why: Reason that is noted when the change is automatic; empty when an operator asks for it.

        Raises:
            ConfigError: Fewer than one host, or more hosts than experts of a layer.
            ChangeUnderWay: The change is automatic, and another one is under way.
        """
        with self.changed:
            if why:
                self._membership.require_steady()
            scaling = self._membership.scale(target, self._clock())
            if why:
                self._membership.note(self._clock(), "autoscaled", why)
            self.changed.notify_all()
            return scaling

    def drain(self, id: str, *, replace: bool = False) -> Scaling:
        """Retire one host once its experts are elsewhere.

        Args:
            replace: Start another host in its place; otherwise the job has one host less.

        Raises:
            ConfigError: The host does not exist, or is the only one and is not replaced.
            ChangeUnderWay: Another change is under way.
        """
        with self.changed:
            scaling = self._membership.drain(id, self._clock(), replace=replace)
            self.changed.notify_all()
            return scaling

    @property
    def scaling(self) -> Scaling | None:
        """The latest requested change of the number of hosts."""
        return self._membership.scaling

    @property
    def wanted(self) -> int:
        """Number of hosts that the job should have."""
        return self._membership.wanted

    def note(self, kind: str, text: str) -> None:
        """Record an event."""
        with self.changed:
            self._membership.note(self._clock(), kind, text)
            self.changed.notify_all()

    def record(self, event: Event) -> None:
        """Add an event that another process has noticed; a repeat does nothing."""
        with self.changed:
            if event not in self._membership.events:
                self._membership.events.add(event)

    @property
    def lacking(self) -> str:
        """What the cluster lacks for hosts that wait to be started; empty if nothing is known."""
        return self._membership.lacking

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str], lacking: str = ""
    ) -> tuple[Orders, int]:
        """Hosts to start and to stop, and the number of hosts that the job should have.

        Args:
            starting: Hosts that were started and have not registered yet.
            failed: Host id -> why it did not start, or how it ended.
            stopped: Hosts that were ended as ordered.
            lacking: What the cluster lacks for hosts that wait to be started; empty if nothing is known.
        """
        with self.changed:
            there = [id for id in failed if id in self._membership.members]
            for id, why in failed.items():
                self._membership.start_failed(id, why, self._clock())
            self._membership.stopped(stopped)
            orders = self._membership.orders(starting, self._clock(), lacking=lacking)
            wanted = self._membership.wanted
            if failed:
                self.changed.notify_all()
        for id in there:
            self._remove(id, failed[id])
        return orders, wanted

    def hosts(self) -> HostClients:
        """All live hosts, in the order of their registration."""
        with self.changed:
            return {
                id: (member.info, self._clients[id])
                for id, member in self._membership.members.items()
                if id in self._clients
            }

    def infos(self) -> dict[str, HostInfo]:
        """Host id -> description, of all live hosts."""
        return {id: info for id, (info, _) in self.hosts().items()}

    def stages(self) -> dict[str, Stage]:
        """Host id -> stage of its life."""
        with self.changed:
            return {id: member.stage for id, member in self._membership.members.items()}

    def leaving(self) -> tuple[str, ...]:
        """Hosts that are being retired."""
        return tuple(id for id, stage in self.stages().items() if stage is Stage.LEAVING)

    def sites(self) -> tuple[Site, ...]:
        """The hosts that should hold experts."""
        with self.changed:
            return self._membership.sites()

    def await_sites(self, timeout: float) -> tuple[Site, ...]:
        """The hosts that should hold experts, once there is at least one.

        Raises:
            ResourceError: There is none within `timeout` seconds, or the coordinator has been closed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self._closed or self._membership.sites(), timeout)
            if self._closed:
                raise ResourceError("the coordinator has been closed")
            sites = self._membership.sites()
            if not sites:
                raise ResourceError(f"no expert host has come up within {timeout:g} s")
            return sites

    def events(self) -> tuple[Event, ...]:
        """The recorded events, oldest first; only the latest are kept."""
        with self.changed:
            return tuple(self._membership.events)

    def events_after(self, known: int) -> tuple[int, list[Event]]:
        """Number of events so far, and the kept ones among those after the first `known`."""
        with self.changed:
            return self._membership.events.recorded, self._membership.events.after(known)

    def record_holders(self, holding: set[str]) -> None:
        """Note which hosts hold experts now, and close the clients of hosts that were retired thereby."""
        with self.changed:
            self._membership.placed(holding, self._clock())
            left = [id for id in self._clients if id not in self._membership.members]
            clients = [self._clients.pop(id) for id in left]
            self.changed.notify_all()
        for client in clients:
            client.close()

    def ping_all(self, timeout: float) -> None:
        """Ping all hosts in the background; one whose process is gone is declared dead."""
        for id, (_, client) in self.hosts().items():
            if id not in self._pinged:
                self._pinged.add(id)
                self._ping_later(self._ping, id, client, timeout)

    def probe_all(self, why: str) -> bool:
        """Ping all hosts and wait; declare those dead that do not answer, and return whether there was one.

        Args:
            why: Why they are looked at: the beginning of the reason that is recorded for a dead host.
        """
        probes = [
            self._pings.submit(self._probe, id, client, why) for id, (_, client) in self.hosts().items()
        ]
        return not all([probe.result() for probe in probes])

    def close(self) -> None:
        """Close all clients, which ends the calls under way, and end the threads."""
        with self.changed:
            self._closed = True
            clients = list(self._clients.values())
            self.changed.notify_all()
        self.published.close("the coordinator has been closed")
        for client in clients:
            client.close()
        self.commands.close()
        self._pings.close()

    def _ping_later(self, call: Callable[..., object], *arguments: object) -> None:
        if not self._closed:
            self._pings.begin(call, *arguments)

    def _probe(self, id: str, client: HostControl, why: str) -> bool:
        """Ping a host, and declare it dead if it does not answer. Returns whether it lives."""
        try:
            client.ping(self._patience)
        except RaymoeError as error:
            if is_loss(error) and not self._closed:
                late = isinstance(error, ChannelTimeout)
                found = silence(self._patience) if late else str(error)
                self.lose(id, why if found == why else f"{why} ({found})")
                return False
        self.record_answer(id)
        return True

    def _ping(self, id: str, client: HostControl, timeout: float) -> None:
        """Ping a host; one that is slow is not dead until its silence has lasted long enough."""
        try:
            client.ping(timeout)
        except ChannelTimeout:
            return
        except RaymoeError as error:
            if is_loss(error):  # asked again, and if that fails alike it is told once
                self._probe(id, client, str(error))
                return
        finally:
            self._pinged.discard(id)
        self.record_answer(id)

    def _remove(self, id: str, why: str) -> None:
        """Publish tables without a former member, close its client, and tell the listener."""
        self.published.without(id)
        with self.changed:
            client = self._clients.pop(id, None)
            self.changed.notify_all()
        if client is not None:
            client.close()
        if self._on_lost is not None:
            self._on_lost(id, why)


__all__ = ["HostClients", "HostRoster", "silence", "steady"]
