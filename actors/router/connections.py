"""The connections of one lane: its channels to the expert hosts, opened when they are first used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from actors.router.lane_turns import LaneWaits
from channels.base import Channel, Request, Ticket
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout, ProtocolError, RaymoeError, RemoteError, StaleEpoch

Connect = Callable[[HostInfo], Channel]

_GONE: Final = "the host has left the routing table"
_LOOK: Final = 0.02  # seconds between two checks of whether a host that is being connected to has left


@dataclass(slots=True)
class LaneCounters:
    """Traffic of a lane; every number only grows.

    Attributes:
        tokens: (token, layer) pairs dispatched.
        rows: Rows sent to hosts; rows / tokens = hosts per token.
        bytes: Payload of requests and replies.
    """

    tokens: int = 0
    rows: int = 0
    bytes: int = 0


class Connections:
    """One lane's channels to the expert hosts; one thread uses them, and any thread may `cut` them.

    Args:
        connect: Opens a channel to a host; called in the lane's thread.
        interruptible: Whether `cut` may be called while a channel is being opened.
        waits: Surrounds the waits for replies.

    Attributes:
        counters: Traffic through these channels.
    """

    def __init__(
        self, connect: Connect, *, interruptible: bool = False, waits: LaneWaits | None = None
    ) -> None:
        self._connect, self._interruptible, self._waits = connect, interruptible, waits
        self.counters = LaneCounters()
        self._channels: dict[str, Channel] = {}
        self._gone: set[str] = set()  # hosts that have left the routing table
        self._cut: deque[str] = deque()  # hosts whose channels were cut and have yet to be closed
        self._disconnected: Callable[[str], None] = lambda _: None

    def on_disconnect(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with a host's id when the channel to it is closed."""
        self._disconnected = listener

    def submit(self, host: HostInfo, request: Request) -> Ticket:
        """Send one request to a host.

        Raises:
            RaymoeError: As from `Channel.submit`, with the host's name; the channel is closed.
        """
        try:
            channel = self._channels.get(host.id) or self._open(host)
            self.counters.bytes += _bytes(request.tensors)
            return channel.submit(request)
        except RaymoeError as error:
            raise self.failed(host, error) from error

    def wait(self, host: HostInfo, ticket: Ticket, timeout: float | None, step: int) -> tuple[Tensor, ...]:
        """The reply of a host.

        Args:
            timeout: Seconds; None waits without a limit.
            step: Step of the request, for the timeline.

        Raises:
            RemoteError: The host's error, with its name.
            RaymoeError: There is no reply; the channel is closed.
        """
        try:
            if self._waits is None:
                reply = ticket.result(timeout)
            else:
                with self._waits.away(step, host.id):
                    reply = ticket.result(timeout)
        except RemoteError as error:
            raise _named(error, host) from error
        except RaymoeError as error:
            raise self.failed(host, error) from error
        self.counters.bytes += _bytes(reply)
        return reply

    def takes(self, host: HostInfo, device: torch.device) -> bool:
        """Whether the channel to a host takes tensors of a device as they are.

        Raises:
            ChannelError: The host cannot be reached.
        """
        return device.type == "cpu" or self.channel(host).takes(device)

    def channel(self, host: HostInfo) -> Channel:
        """The channel to a host, opened if there is none.

        Raises:
            RaymoeError: The host cannot be reached.
        """
        try:
            return self._channels.get(host.id) or self._open(host)
        except RaymoeError as error:
            raise _named(error, host) from error

    def reaches(self, host: HostInfo) -> bool:
        """Whether there is a channel to a host."""
        return host.id in self._channels

    def failed(self, host: HostInfo, error: RaymoeError) -> RaymoeError:
        """Close the channel to a host after an error; the error with the host's name."""
        self._disconnect(host.id)
        return _named(error, host)

    def cut(self, gone: Collection[str], there: Collection[str]) -> None:
        """End the waits for hosts that have left the routing table. Any thread.

        Args:
            gone: Ids of hosts that have left.
            there: Ids of hosts that are in the table, and may have come back.
        """
        self._gone = (self._gone | set(gone)) - set(there)
        for host_id in gone:
            channel = self._channels.get(host_id)
            if channel is not None:
                channel.cut(_GONE)
                self._cut.append(host_id)

    def close_cut(self) -> None:
        """Close the channels that were cut."""
        while self._cut:
            self._disconnect(self._cut.popleft())

    def close(self) -> None:
        """Close all channels."""
        for host_id in list(self._channels):
            self._disconnect(host_id)

    def _open(self, host: HostInfo) -> Channel:
        def gone() -> bool:
            return host.id in self._gone

        channel = _open_unless(gone, self._connect, host) if self._interruptible else self._connect(host)
        self._channels[host.id] = channel
        if gone():  # it left while the channel was opened, too early for `cut` to find the channel
            raise ChannelError(_GONE)
        return channel

    def _disconnect(self, host_id: str) -> None:
        """Close the channel to a host; the next request opens a new one."""
        channel = self._channels.pop(host_id, None)
        self._disconnected(host_id)
        if channel is not None:
            with suppress(RaymoeError):
                channel.close()


class _Opening:
    """A channel that is being opened in a thread of its own."""

    def __init__(self, connect: Connect, host: HostInfo) -> None:
        self._connect, self._host = connect, host
        self._lock = threading.Lock()
        self._abandoned = False
        self._outcome: Channel | BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name=f"connect-{host.id}", daemon=True).start()

    def result(self) -> Channel:
        """The channel, or the error of opening it, after `done` is set."""
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def abandon(self) -> None:
        """Close the channel as soon as it is open."""
        with self._lock:
            self._abandoned = True
            outcome = self._outcome
        _close(outcome)

    def _run(self) -> None:
        outcome: Channel | BaseException
        try:
            outcome = self._connect(self._host)
        except BaseException as error:
            outcome = error
        with self._lock:
            self._outcome = outcome
            abandoned = self._abandoned
        self.done.set()
        if abandoned:
            _close(outcome)


def _open_unless(gone: Callable[[], bool], connect: Connect, host: HostInfo) -> Channel:
    """`connect(host)`, given up as soon as the host has left the routing table.

    Raises:
        ChannelError: The host has left; and what `connect` raises.
    """
    opening = _Opening(connect, host)
    while not opening.done.wait(_LOOK):
        if gone():
            opening.abandon()
            raise ChannelError(_GONE)
    return opening.result()


def _close(outcome: Channel | BaseException | None) -> None:
    if outcome is not None and not isinstance(outcome, BaseException):
        with suppress(RaymoeError):
            outcome.close()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _named(error: RaymoeError, host: HostInfo) -> RaymoeError:
    """The same error with the host's name and addresses."""
    text = f"expert host {host.id} ({', '.join(host.addresses.values()) or 'in process'}): {error}"
    if isinstance(error, StaleEpoch):
        return StaleEpoch(text, epoch=error.epoch)
    for kind in (ChannelTimeout, RemoteError, ChannelError):
        if isinstance(error, kind):
            return kind(text)
    return ProtocolError(text) if isinstance(error, ProtocolError) else error


__all__ = ["Connect", "Connections", "LaneCounters"]
