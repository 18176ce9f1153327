"""The channel of torch.distributed: counts over a socket, then rows between the two ranks of a process group.

Each channel has a group of its own, of caller (rank 0) and host (rank 1), which lives as long as the
connection: a new placement, a host more or one less touches no other pair's. The connection carries the
group's rendezvous, then a header ahead of each payload, so the receiver waits without a time limit while
nothing comes, and hears at once of a peer that died. Small tensors come with the header, large ones by the
group (`channels.collective.rows`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch

from channels.base import Channel, Handler, Request
from channels.collective.rows import Rows
from channels.framing import header as headers
from channels.framing.accepting import BACKLOG, AcceptingServer
from channels.framing.codec import address_of, buffer_of, tensor_at
from channels.framing.header import Layout, Placement
from channels.framing.line import INLINE, Head, Line
from channels.framing.pipe import Pipe, Reply, call
from channels.grpc import tls
from errors import ChannelError, ChannelTimeout, ProtocolError, ResourceError

KIND: Final = "collective"
_CALLER, _HOST = 0, 1
_FORMING: Final = 30.0
"""Seconds that a host gives a caller for the group to form."""


class End:
    """One end of a connection: messages with their payloads."""

    def __init__(
        self, connection: socket.socket, rank: int, *, peer: str, interface: str, timeout: float
    ) -> None:
        self.caller = peer
        self._line = Line(connection, peer)
        self._rows = Rows(self._line, rank, peer, interface, timeout)

    def send(self, text: bytes, payload: Layout, tensors: Sequence[torch.Tensor]) -> None:
        """A message, whose tensors stay as they are until it is answered, or until the next one comes."""
        headers.require_fit(payload.size)
        parts = _parts(payload.placed)
        near: list[Any] = [buffer_of(tensors[at]) for at, where in parts.small if where.elements]
        inline = b"".join(near)
        head = Head(text, payload.size, inline, self._rows.received)
        if parts.large:
            self._rows.send([tensors[at] for at, _ in parts.large], lambda: self._line.write(head))
        else:
            self._line.write(head)

    def head(self, deadline: float | None = None) -> Head:
        """See `Line.read`."""
        self._rows.ask_ahead()
        head = self._line.read(deadline)
        self._rows.arrived(head.received)
        return head

    def payload(self, placed: tuple[Placement, ...], head: Head, deadline: float | None) -> Reply:
        """The tensors of the message whose head was read.

        Raises:
            ProtocolError: the header and what came with it do not agree.
        """
        parts = _parts(placed)
        if parts.bytes > head.size:
            raise ProtocolError(f"tensors of {parts.bytes} bytes lie in a payload of {head.size}")
        if parts.inline != len(head.inline):
            raise ProtocolError(
                f"{len(head.inline)} bytes came with a header of {parts.inline} that are small"
            )
        found: list[Any] = [None] * len(placed)
        near = np.frombuffer(head.inline, np.uint8)
        address = address_of(near)
        for at, where in parts.small:  # while the large ones are on their way
            found[at] = tensor_at(near, address, where)
        if parts.large:
            come = self._rows.receive([where for _, where in parts.large], deadline)
            for (at, _), tensor in zip(parts.large, come, strict=True):
                found[at] = tensor
        return tuple(found)

    def takes(self, device: torch.device) -> bool:
        """See `channels.base.Channel`."""
        return device.type == "cpu"

    def shut(self) -> None:
        """Whoever waits for a message at this end, or the other, waits no longer. Any thread."""
        self._line.shut()

    def close(self) -> None:
        """Give everything back."""
        self.shut()
        self._line.close()
        self._rows.close()


class EndMaker(Protocol):
    """Makes an end of a connection, which a group forms over."""

    def __call__(
        self, connection: socket.socket, rank: int, *, peer: str, interface: str, timeout: float
    ) -> End: ...


class _Parts(NamedTuple):
    """What goes which way of a payload's tensors.

    Attributes:
        small: that come with the header: which, and where within its bytes.
        large: that come by the group: which, and where each lies in memory of its own.
        inline, bytes: of the small ones, and of all.
    """

    small: tuple[tuple[int, Placement], ...]
    large: tuple[tuple[int, Placement], ...]
    inline: int
    bytes: int


@lru_cache(maxsize=1024)
def _parts(placed: tuple[Placement, ...]) -> _Parts:
    """Small are tensors, in their order, as long as they find room. Calls of a size follow one another."""
    small, large, at = [], [], 0
    for index, where in enumerate(placed):
        size = where.end - where.offset
        if at + size <= INLINE:
            small.append((index, where._replace(offset=at, end=at + size)))
            at += size
        else:
            large.append((index, where._replace(offset=0, end=size)))
    return _Parts(tuple(small), tuple(large), at, at + sum(where.end for _, where in large))


class CollectiveChannel(Pipe):
    """The router's end."""

    def __init__(self, name: str, end: End) -> None:
        super().__init__(name)
        self._end = end

    def takes(self, device: torch.device) -> bool:
        """See `channels.base.Channel`."""
        return self._end.takes(device)

    def _send(self, request: Request) -> None:
        payload = headers.layout(request.tensors)
        self._end.send(headers.request_text(request.id, payload), payload, request.tensors)

    def _receive(self, deadline: float | None) -> Reply:
        head = self._end.head(deadline)
        return self._end.payload(headers.read_reply(head.text, head.size), head, deadline)

    def _hang_up(self) -> None:
        self._end.close()

    def _wake(self) -> None:
        self._end.shut()


class CollectiveServer(AcceptingServer[End]):
    """The host's end.

    Args:
        end: makes its end of each connection; None takes that of CPUs.
        kind: that its address begins with.

    Raises:
        ResourceError: TLS is asked for, which rows between ranks have not.
        ChannelError: the interface cannot be listened on.
    """

    def __init__(
        self, handler: Handler, *, bind: str = "127.0.0.1:0", end: EndMaker | None = None, kind: str = KIND
    ) -> None:
        if tls.directory() is not None:
            raise ResourceError(
                f"{tls.VARIABLE} is set, and the collective channel is not encrypted; use grpc"
            )
        self._handler, self._end = handler, end or End
        host, _, port = bind.rpartition(":")
        bare = host.strip("[]")  # which an address of IPv6 has
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        try:
            listener = socket.create_server((bare, int(port)), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ChannelError(f"collective cannot listen at {bind}: {error}") from error
        super().__init__(listener, f"{kind}:{host}:{listener.getsockname()[1]}")
        self.start()

    def _begin(self, connection: socket.socket) -> End:
        peer, interface = str(connection.getpeername()), connection.getsockname()[0]
        return self._end(connection, _HOST, peer=peer, interface=interface, timeout=_FORMING)

    def _talk(self, found: End) -> None:
        while True:
            head = found.head()
            name, placed = headers.read_request(head.text, head.size)
            outcome = call(self._handler, Request(name, found.payload(placed, head, None)))
            if isinstance(outcome, Exception):
                found.send(headers.error_text(outcome), headers.layout(()), ())
                continue
            try:
                payload = headers.layout(outcome)
                found.send(headers.reply_text(payload), payload, outcome)
            except ProtocolError as error:  # what the handler returned cannot travel
                found.send(headers.error_text(error), headers.layout(()), ())


def serve(handler: Handler, *, bind: str = "127.0.0.1:0") -> CollectiveServer:
    """Let any process that reaches `bind` call `handler`, which runs in one thread a connection.

    Raises:
        ResourceError: TLS is asked for.
        ChannelError: `bind` is taken or not of this machine.
    """
    return CollectiveServer(handler, bind=bind)


def connect(address: str, *, timeout: float = 30.0, end: EndMaker | None = None, kind: str = KIND) -> Channel:
    """Open a channel to a server of any machine.

    Args:
        end: makes this end; None takes that of CPUs.
        kind: that the address begins with.

    Raises:
        ChannelTimeout: the server does not answer in time.
        ChannelError: nobody listens there, or no group forms.
    """
    host, _, port = address.removeprefix(f"{kind}:").rpartition(":")
    deadline = time.monotonic() + timeout
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout)
    except TimeoutError as error:
        raise ChannelTimeout(f"{address} does not accept connections within {timeout} s") from error
    except OSError as error:
        raise ChannelError(f"nobody listens at {address} ({error}); has its process ended?") from error
    try:
        interface = connection.getsockname()[0]
        left = deadline - time.monotonic()
        made = (end or End)(connection, _CALLER, peer=address, interface=interface, timeout=left)
        return CollectiveChannel(address, made)
    except BaseException:
        connection.close()
        raise


__all__ = ["CollectiveChannel", "CollectiveServer", "End", "EndMaker", "connect", "serve"]
