"""The channel of torch.distributed: headers over a socket, rows between the two ranks of a process group.

Each channel has a group of its own, of caller (rank 0) and host (rank 1), which lives as long as the
connection: a new placement, or one host more or less, affects no other pair. The connection carries the
group's rendezvous, then a header ahead of each payload, so the receiver waits without a timeout while nothing
comes, and learns at once of a peer that died. `RankEnd` is one end: between CPUs in
`channels.collective.gloo_end`, between GPUs in `channels.collective.nccl`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from channels.base import Channel, Handler, Request
from channels.collective.gloo_end import GlooEnd
from channels.framing import header as headers
from channels.framing.accepting import BACKLOG, AcceptingServer
from channels.framing.header import Layout, TensorSpan
from channels.framing.message_socket import Head
from channels.framing.ordered_channel import OrderedChannel, Reply, call
from channels.grpc import tls
from errors import ChannelError, ChannelTimeout, ProtocolError, ResourceError

KIND: Final = "collective"
_CALLER, _HOST = 0, 1
_FORMING: Final = 30.0
"""Seconds that a host waits for the group to form."""


class RankEnd(Protocol):
    """One end of a connection between two ranks: messages with their payloads."""

    @property
    def caller(self) -> str:
        """The peer's address, for logs."""
        ...

    def send(self, text: bytes, payload: Layout, tensors: Sequence[torch.Tensor]) -> None:
        """Send a message; its tensors stay as they are until it is answered, or the next one comes."""
        ...

    def head(self, deadline: float | None = None) -> Head:
        """Wait for the head of the next message, see `MessageSocket.read`."""
        ...

    def payload(self, spans: tuple[TensorSpan, ...], head: Head, deadline: float | None) -> Reply:
        """The tensors of the message whose head was read.

        Raises:
            ProtocolError: The header and the payload do not agree.
        """
        ...

    def takes(self, device: torch.device) -> bool:
        """Whether messages carry tensors of a device as they are."""
        ...

    def shut(self) -> None:
        """RankEnd the waits for messages at both ends. Any thread."""
        ...

    def close(self) -> None:
        """Free the connection and the group."""
        ...


class EndMaker(Protocol):
    """Makes an end of a connection, and forms a group over it."""

    def __call__(
        self, connection: socket.socket, rank: int, *, peer: str, interface: str, timeout: float
    ) -> RankEnd: ...


class CollectiveChannel(OrderedChannel):
    """The router's end of the collective channel."""

    def __init__(self, name: str, end: RankEnd) -> None:
        super().__init__(name)
        self._end = end

    def takes(self, device: torch.device) -> bool:
        return self._end.takes(device)

    def _send(self, request: Request) -> None:
        payload = headers.layout(request.tensors)
        self._end.send(headers.request_text(request.id, payload), payload, request.tensors)

    def _receive(self, deadline: float | None) -> Reply:
        head = self._end.head(deadline)
        return self._end.payload(headers.read_reply(head.text, head.size), head, deadline)

    def _disconnect(self) -> None:
        self._end.close()

    def _wake(self) -> None:
        self._end.shut()


class CollectiveServer(AcceptingServer[RankEnd]):
    """The host's end of the collective channel.

    Args:
        end: Makes its end of each connection; None makes a `GlooEnd`.
        kind: The scheme of its address.

    Raises:
        ResourceError: TLS is configured, and rows between ranks are not encrypted.
        ChannelError: The server cannot listen on the interface.
    """

    def __init__(
        self, handler: Handler, *, bind: str = "127.0.0.1:0", end: EndMaker | None = None, kind: str = KIND
    ) -> None:
        if tls.directory() is not None:
            raise ResourceError(
                f"{tls.VARIABLE} is set, and the collective channel is not encrypted; use grpc"
            )
        self._handler: Handler = handler
        self._end: EndMaker = end or GlooEnd
        host, _, port = bind.rpartition(":")
        bare = host.strip("[]")  # an IPv6 address has brackets
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        try:
            listener = socket.create_server((bare, int(port)), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ChannelError(f"collective cannot listen at {bind}: {error}") from error
        super().__init__(listener, f"{kind}:{host}:{listener.getsockname()[1]}")
        self.start()

    def _begin(self, connection: socket.socket) -> RankEnd:
        peer, interface = str(connection.getpeername()), connection.getsockname()[0]
        return self._end(connection, _HOST, peer=peer, interface=interface, timeout=_FORMING)

    def _talk(self, found: RankEnd) -> None:
        while True:
            head = found.head()
            name, spans = headers.read_request(head.text, head.size)
            outcome = call(self._handler, Request(name, found.payload(spans, head, None)))
            if isinstance(outcome, Exception):
                found.send(headers.error_text(outcome), headers.layout(()), ())
                continue
            try:
                payload = headers.layout(outcome)
                found.send(headers.reply_text(payload), payload, outcome)
            except ProtocolError as error:  # the wire cannot carry the handler's reply
                found.send(headers.error_text(error), headers.layout(()), ())


def serve(handler: Handler, *, bind: str = "127.0.0.1:0") -> CollectiveServer:
    """Serve `handler` to processes of any machine, in one thread per connection.

    Args:
        bind: `host:port`; port 0 takes a free one.

    Raises:
        ResourceError: TLS is configured.
        ChannelError: `bind` is taken, or is not an address of this machine.
    """
    return CollectiveServer(handler, bind=bind)


def connect(address: str, *, timeout: float = 30.0, end: EndMaker | None = None, kind: str = KIND) -> Channel:
    """Open a channel to a server of any machine.

    Args:
        end: Makes this end; None makes a `GlooEnd`.
        kind: The scheme of the address.

    Raises:
        ChannelTimeout: The server does not answer in time.
        ChannelError: No server listens there, or no group forms.
    """
    host, _, port = address.removeprefix(f"{kind}:").rpartition(":")
    deadline = time.monotonic() + timeout
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout)
    except TimeoutError as error:
        raise ChannelTimeout(f"{address} does not accept connections within {timeout} s") from error
    except OSError as error:
        raise ChannelError(f"no process listens at {address} ({error}); has its process ended?") from error
    try:
        interface = connection.getsockname()[0]
        left = deadline - time.monotonic()
        make: EndMaker = end or GlooEnd
        made = make(connection, _CALLER, peer=address, interface=interface, timeout=left)
        return CollectiveChannel(address, made)
    except BaseException:
        connection.close()
        raise


__all__ = ["CollectiveChannel", "CollectiveServer", "EndMaker", "RankEnd", "connect", "serve"]
