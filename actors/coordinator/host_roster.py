"""The expert hosts of a job as the coordinator reaches them: who is there, who answers, who is dead.

No call to a host is made, and nobody is told of a loss, with a lock held: a host that hangs holds up only
those who asked it, until it is taken for dead; then its client is closed, which ends their calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from actors.coordinator.routing_tables import Published
from actors.messages.steps import HostControl
from cluster.membership import Event, Membership, Orders, Scaling, Stage
from cluster.placement import Site
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, RaymoeError, RemoteError, ResourceError, is_loss

_T = TypeVar("_T")
_AT_ONCE = 32  # hosts that are asked, and hosts that obey
_BEGAN = time.time() - time.monotonic()


def steady() -> float:
    """Seconds since the epoch by a clock that is never set: else all hosts would seem silent at once."""
    return _BEGAN + time.monotonic()


class Roster:
    """Who is there. Any thread may call.

    Args:
        membership: the hosts.
        versions: what they hold.
        control: how to command a host.
        on_lost: is told of a host that is dead, and why.
        patience: seconds that a host has to answer after something went wrong with it.
        clock: seconds since the epoch.
        pool: carries out calls to hosts; None makes threads.
    """

    def __init__(
        self,
        membership: Membership,
        versions: Published,
        control: Callable[[HostInfo], HostControl],
        *,
        on_lost: Callable[[str, str], None] | None = None,
        patience: float = 1.0,
        clock: Callable[[], float] = steady,
        pool: Executor | None = None,
    ) -> None:
        self.versions = versions
        self.changed = threading.Condition()  # guards the membership
        self._membership = membership
        self._control = control
        self._on_lost = on_lost
        self._patience = patience
        self._clock = clock
        self._controls: dict[str, HostControl] = {}
        self._asked: set[str] = set()
        self._closed = False
        # Two, so that moves which take long keep nobody from asking whether a host lives.
        self._obeying = pool or ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hosts")
        self._asking = pool or ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pings")

    def register(self, info: HostInfo) -> None:
        """Take in a host; a repeat is fine.

        Raises:
            ProtocolError: a host of this name has been there and is gone.
        """
        with self.changed:
            self._membership.register(info, self._clock())
            if info.id not in self._controls:
                self._controls[info.id] = self._control(info)
            self.changed.notify_all()

    def lose(self, id: str, why: str) -> bool:
        """Take a host for dead, at once: tables come without it. Whether it was there."""
        with self.changed:
            was = self._membership.lose(id, why, self._clock())
        if was:
            self._gone(id, why)
        return was

    def suspect(self, id: str, why: str) -> None:
        """Somebody cannot reach a host: ask it, and bury it if it does not answer."""
        control = self._controls.get(id)
        if control is not None:
            self._ask_later(self._probe, id, control, why)

    def saw(self, id: str) -> None:
        """A host has answered."""
        with self.changed:
            self._membership.saw(id, self._clock())

    def saw_all(self) -> None:
        """Nobody has listened for a while: whose silence began meanwhile cannot be told."""
        with self.changed:
            for id in self._membership.members:
                self._membership.saw(id, self._clock())

    def silent(self, patience: float) -> list[str]:
        """Hosts that have not answered for so many seconds."""
        with self.changed:
            return self._membership.silent(self._clock(), patience)

    def scale(self, target: int, *, why: str = "") -> Scaling:
        """See `Membership.scale`.

        Args:
            why: noted, if it is not a person who wants it.
        """
        with self.changed:
            scaling = self._membership.scale(target, self._clock())
            if why:
                self._membership.note(self._clock(), "autoscaled", why)
            self.changed.notify_all()
            return scaling

    def drain(self, id: str, *, replace: bool = False) -> Scaling:
        """See `Membership.drain`."""
        with self.changed:
            scaling = self._membership.drain(id, self._clock(), replace=replace)
            self.changed.notify_all()
            return scaling

    @property
    def scaling(self) -> Scaling | None:
        """The last change of the number of hosts that was asked for."""
        return self._membership.scaling

    def note(self, kind: str, text: str) -> None:
        """Remember an event."""
        with self.changed:
            self._membership.note(self._clock(), kind, text)
            self.changed.notify_all()

    def orders(
        self, *, starting: int, failed: Mapping[str, str], stopped: Iterable[str]
    ) -> tuple[Orders, int]:
        """What whoever runs the hosts has to do, told how they stand, and how many hosts are wanted."""
        with self.changed:
            there = [id for id in failed if id in self._membership.members]
            for id, why in failed.items():
                self._membership.start_failed(id, why, self._clock())
            self._membership.stopped(stopped)
            orders = self._membership.orders(starting, self._clock())
            wanted = self._membership.wanted
            if failed:
                self.changed.notify_all()
        for id in there:
            self._gone(id, failed[id])
        return orders, wanted

    def hosts(self) -> dict[str, tuple[HostInfo, HostControl]]:
        """Hosts that are there, in the order in which they came."""
        with self.changed:
            return {
                id: (member.info, self._controls[id])
                for id, member in self._membership.members.items()
                if id in self._controls
            }

    def stages(self) -> dict[str, Stage]:
        """Where every host is in its life."""
        with self.changed:
            return {id: member.stage for id, member in self._membership.members.items()}

    def leaving(self) -> tuple[str, ...]:
        """Hosts that are to go."""
        return tuple(id for id, stage in self.stages().items() if stage is Stage.LEAVING)

    def events(self) -> tuple[Event, ...]:
        """What happened, oldest first, as far back as it is kept."""
        with self.changed:
            return tuple(self._membership.events)

    def ping_all(self, timeout: float) -> None:
        """Ask all hosts for a sign of life, without waiting for it: those that hang up are buried."""
        for id, (_, control) in self.hosts().items():
            if id not in self._asked:
                self._asked.add(id)
                self._ask_later(self._ask, id, control, timeout)

    def await_sites(self, timeout: float) -> tuple[Site, ...]:
        """The hosts that should hold experts, once there is one.

        Raises:
            ResourceError: there is none within so many seconds.
        """
        with self.changed:
            self.changed.wait_for(lambda: self._closed or self._membership.sites(), timeout)
            if self._closed:
                raise ResourceError("the coordinator has been closed")
            sites = self._membership.sites()
            if not sites:
                raise ResourceError(f"no expert host has come up within {timeout:g} s")
            return sites

    def bury_the_dead(self, why: str) -> bool:
        """Ask all hosts; whether one of them did not answer, and is taken for dead."""
        probes = [
            self._submit(self._asking, self._probe, id, control, why)
            for id, (_, control) in self.hosts().items()
        ]
        return not all([probe.result() for probe in probes])

    def close(self) -> None:
        """Hang up on all hosts, which ends calls to them, and end the threads."""
        with self.changed:
            self._closed = True
            controls = list(self._controls.values())
            self.changed.notify_all()
        self.versions.close("the coordinator has been closed")
        for control in controls:
            control.close()
        for pool in (self._obeying, self._asking):
            pool.shutdown(wait=True, cancel_futures=True)

    # --- how

    def _on(self, ids: Iterable[str], what: str, call: Callable[[str], None]) -> None:
        """Call for every host at once; all are waited for, then the first error raised."""
        pending = {id: self._submit(self._obeying, call, id) for id in ids}
        errors: list[tuple[str, BaseException]] = []
        for id, future in pending.items():
            try:
                future.result()
            except (Exception, CancelledError) as error:
                errors.append((id, error))
        if errors:
            raise failed_on(what, errors) from errors[0][1]

    def _submit(self, pool: Executor, call: Callable[..., _T], *arguments: object) -> Future[_T]:
        try:
            return pool.submit(call, *arguments)
        except RuntimeError as error:  # it takes no more work
            raise ResourceError("the coordinator is being closed") from error

    def _ask_later(self, call: Callable[..., object], *arguments: object) -> None:
        if not self._closed:
            try:
                self._submit(self._asking, call, *arguments)
            except ResourceError:
                return  # it closes, and needs to know no more

    def _probe(self, id: str, control: HostControl, why: str) -> bool:
        try:
            control.ping(self._patience)
        except RaymoeError as error:
            if is_loss(error) and not self._closed:
                self.lose(id, f"{why} ({error})")
                return False
        self.saw(id)
        return True

    def _ask(self, id: str, control: HostControl, timeout: float) -> None:
        """A sign of life; a host that is slow to give it has until its silence counts."""
        try:
            control.ping(timeout)
        except ChannelTimeout:
            return
        except RaymoeError as error:
            if is_loss(error):
                self._probe(id, control, str(error))
                return
        finally:
            self._asked.discard(id)
        self.saw(id)

    def _gone(self, id: str, why: str) -> None:
        """A host is out of the membership: tables come without it, and whoever waits for it hears so."""
        self.versions.without(id)
        with self.changed:
            control = self._controls.pop(id, None)
            self.changed.notify_all()
        if control is not None:
            control.close()
        if self._on_lost is not None:
            self._on_lost(id, why)

    def _settled(self, holding: set[str]) -> None:
        """These hosts hold experts now; on those that are let go nobody calls any more."""
        with self.changed:
            self._membership.placed(holding, self._clock())
            left = [id for id in self._controls if id not in self._membership.members]
            controls = [self._controls.pop(id) for id in left]
            self.changed.notify_all()
        for control in controls:
            control.close()


def failed_on(what: str, errors: list[tuple[str, BaseException]]) -> RaymoeError:
    """One error for what several hosts failed with: a loss if one is lost, else of the first one's class."""
    text = "; ".join(f"expert host {id} failed to {what}: {error}" for id, error in errors)
    if any(is_loss(error) for _, error in errors):
        return ChannelError(text)
    first = errors[0][1]
    if isinstance(first, RaymoeError) and not isinstance(first, RemoteError):
        return type(first)(text)
    return RaymoeError(text)


__all__ = ["Roster", "failed_on", "steady"]
