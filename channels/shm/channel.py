"""The channel within a machine: payloads in shared memory, packets over a Unix socket.

A request is written once, into a segment, and read there by the handler; a reply likewise. Small replies are
copied, large ones are lent to the caller: their segment is reused when the caller has dropped the tensors.
Packets are sent by `channels.shm.doorbell`. Sockets are abstract and memory has no name, so a process that
dies leaves nothing behind.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from channels.base import Channel, Handler, Request
from channels.framing import header as headers
from channels.framing.accepting import AcceptingServer
from channels.framing.buffers import OwnedBuffer, tensor_at
from channels.framing.header import TensorSpan
from channels.framing.ordered_channel import OrderedChannel, Reply, call
from channels.locality import machine_id
from channels.shm.abstract_sockets import dial, listen
from channels.shm.doorbell import Doorbell
from channels.shm.mailbox import HostMailbox, MailboxHandler, ShmMailbox
from channels.shm.segments import ShmSegment
from errors import ChannelError, ProtocolError, RemoteError
from kernels.mailbox import MAIL, PACKET

_LEND_FROM: Final = 1 << 18
"""Bytes from which a reply is lent and not copied: below, a copy is cheaper."""
_EMPTY: Final = headers.layout(())
_LOOKS: Final = 1000  # reads of a mailbox between two reads of the clock
_RESTLESS: Final = 2e-3
"""Seconds without a request in its mailbox after which a host sleeps: longer than between two layers of a
token, so that it sleeps between tokens and not within one."""
_MAX_LENT: Final = 8
"""Most replies lent at a time by one channel; further ones are copied, to bound the number of segments."""


class SegmentLoan(OwnedBuffer):
    """The memory of a lent reply; the segment comes back when the last tensor in it is collected."""

    __slots__ = ("_channel", "_segment")

    def __init__(self, channel: ShmChannel, segment: ShmSegment, size: int) -> None:
        super().__init__(segment, segment.address, size)
        self._channel = channel
        self._segment = segment

    def __del__(self) -> None:
        self._channel.give_back(self._segment)


class ShmChannel(OrderedChannel):
    """The router's end of the shared memory channel."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        super().__init__(name)
        self._bell = Doorbell(connection)
        self._written: deque[int | None] = deque()
        self._lent = 0
        self._back: deque[ShmSegment] = deque()  # segments whose loans have ended

    def _send(self, request: Request) -> None:
        self._take_back()
        payload = headers.layout(request.tensors)
        text = headers.request_text(request.id, payload)
        self._written.append(self._bell.send(text, payload, request.tensors))

    def _receive(self, deadline: float | None) -> Reply:
        self._take_back()
        packet = self._bell.receive(deadline)
        segment = packet.segment
        if not self._written:
            raise ProtocolError(f"{self.name} replies without a request")
        self._bell.reusable(self._written.popleft())
        try:
            spans = headers.read_reply(packet.text, packet.size)
        except RemoteError:
            self._bell.done_with(segment)
            raise
        if segment is None:
            return packet.tensors(spans)
        size = max((where.end for where in spans), default=0)
        if size >= _LEND_FROM and self._lent < _MAX_LENT:
            return self._lend(segment, spans, size)
        reply = tuple([view.clone() for view in packet.tensors(spans)])
        self._bell.done_with(segment)
        return reply

    def _lend(self, segment: ShmSegment, spans: Sequence[TensorSpan], size: int) -> Reply:
        self._lent += 1
        memory: np.ndarray[Any, Any] = np.asarray(SegmentLoan(self, segment, size))
        return tuple([tensor_at(memory, segment.address, where) for where in spans])

    def give_back(self, segment: ShmSegment) -> None:
        """Take a lent segment back. Any thread, within a finalizer too: takes no lock."""
        self._back.append(segment)

    def _take_back(self) -> None:
        while self._back:
            self._bell.done_with(self._back.popleft())
            self._lent -= 1

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> ShmMailbox:
        return self._bell.open_mailbox(width, pairs, dtype)

    def _disconnect(self) -> None:
        self._bell.close()

    def _wake(self) -> None:
        self._bell.shut()


class ShmServer(AcceptingServer[Doorbell]):
    """The host's end of the shared memory channel."""

    def __init__(self, handler: Handler, answer: MailboxHandler | None = None) -> None:
        self._handler = handler
        self._answer_mail = answer
        listener, name = listen()
        super().__init__(listener, f"shm:{machine_id()}/{name}")
        self.start()

    def _begin(self, connection: socket.socket) -> Doorbell:
        return Doorbell(connection)

    def _talk(self, found: Doorbell) -> None:
        while True:
            if found.box is not None and self._answer_mail is not None:
                self._deliver(found.box, self._answer_mail)
            self._answer(found)

    def _deliver(self, box: HostMailbox, answer: MailboxHandler) -> None:
        """Answer requests in a mailbox, until there is a packet to read, or no request for a while."""
        last = time.monotonic()
        while True:
            found = box.watch(_LOOKS)
            if found == MAIL:
                answer(box)
                if self._closed:  # the socket, which is not read while requests come, would end the thread
                    return
                last = time.monotonic()
            elif found == PACKET or (time.monotonic() - last > _RESTLESS and box.rest()):
                return

    def _answer(self, bell: Doorbell) -> None:
        packet = bell.receive()
        if bell.box is not None and not packet.text:  # a wake-up, or a mailbox that has just been opened
            if self._answer_mail is not None:
                bell.box.open()
            return
        name, spans = headers.read_request(packet.text, packet.size)
        outcome = call(self._handler, Request(name, packet.tensors(spans)))
        if isinstance(outcome, Exception):
            bell.send(headers.error_text(outcome), _EMPTY)
            return
        try:
            payload = headers.layout(outcome)
        except ProtocolError as error:  # the wire cannot carry the handler's reply
            bell.send(headers.error_text(error), _EMPTY)
            return
        bell.send(headers.reply_text(payload), payload, outcome)


def serve(handler: Handler, answer: MailboxHandler | None = None) -> ShmServer:
    """Serve `handler` to processes of this machine and user, in one thread per connection.

    Args:
        answer: Answers requests in mailboxes; None for a server that reads none.
    """
    return ShmServer(handler, answer)


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """Open a channel to a server of this machine.

    Raises:
        ChannelTimeout: The server does not accept in time.
        ChannelError: The server is on another machine, gone, or of another user.
    """
    place, _, name = address.removeprefix("shm:").partition("/")
    if place != machine_id():
        raise ChannelError(
            f"{address} is on another machine or in another network namespace than this process"
            f" ({machine_id()}); use grpc"
        )
    connection = dial(name, address, timeout)
    try:
        return ShmChannel(address, connection)
    except BaseException:
        connection.close()
        raise


__all__ = ["ShmChannel", "ShmServer", "connect", "serve"]
