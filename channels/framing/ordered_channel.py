"""The router's end of channels over a wire: requests in flight, whose replies come in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Final

import numpy as np
import torch

from channels.base import Handler, Mailbox, Request
from errors import ChannelError, ChannelTimeout, ProtocolError, RaymoeError, RemoteError, ResourceError

Reply = tuple[torch.Tensor, ...]
MAX_IN_FLIGHT: Final = 32
"""Requests without a reply in one channel; the next `submit` first reads the oldest reply, so that the two
ends never wait for each other with both directions full."""


class OrderedTicket:
    """The ticket of an `OrderedChannel`."""

    __slots__ = ("_channel", "_outcome")

    def __init__(self, channel: OrderedChannel) -> None:
        self._channel = channel
        self._outcome: Reply | RaymoeError | None = None

    def resolve(self, outcome: Reply | RaymoeError) -> None:
        """Set the reply, or the error in its place; only the first one counts."""
        if self._outcome is None:
            self._outcome = outcome

    def result(self, timeout: float | None = None) -> Reply:
        if self._outcome is None:
            self._channel.wait_for(self, timeout)
        outcome = self._outcome
        if outcome is None:
            raise ChannelError(f"{self._channel.name}: the reply was not waited for to its end")
        if isinstance(outcome, RaymoeError):
            raise outcome
        return outcome

    @property
    def resolved(self) -> bool:
        """Whether `result` returns at once."""
        return self._outcome is not None


class OrderedChannel:
    """Base of channels over a wire: keeps the order of replies, timeouts and failures.

    Subclasses send, receive and close.

    Attributes:
        name: The peer's address, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._flying: deque[OrderedTicket] = deque()
        self._broken: RaymoeError | None = None
        self._why: str | None = None  # why it was cut
        self._resolving = threading.Lock()

    def submit(self, request: Request) -> OrderedTicket:
        if len(self._flying) >= MAX_IN_FLIGHT:
            self.wait_for(self._flying[0], None)
        if self._broken is not None:
            raise ChannelError(f"{self._broken}; connect again")
        if self._why is not None:
            raise ChannelError(f"{self.name}: {self._why}")
        ticket = OrderedTicket(self)
        self._flying.append(ticket)
        try:
            self._send(request)
        except ChannelError as error:
            self._fail(error)
            raise
        except (ProtocolError, ResourceError):  # nothing was sent: the request could not be written
            self._flying.pop()
            raise
        except BaseException as error:  # part of it may have been sent: replies could not be told apart
            self._fail(ChannelError(f"{self.name}: closed in the middle of a request ({error!r})"))
            raise
        return ticket

    def wait_for(self, ticket: OrderedTicket, timeout: float | None) -> None:
        """Resolve every ticket up to `ticket`; a failure resolves all of them, and closes the channel."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ticket.resolved and self._broken is None:
            try:
                outcome: Reply | RaymoeError = self._receive(deadline)
            except RemoteError as error:
                outcome = error
            except ChannelTimeout:
                late = ChannelTimeout(f"{self.name}: no reply within {timeout} s; connect and send again")
                ticket.resolve(late)
                self._fail(ChannelError(f"{self.name}: closed after a reply was late"))
                return
            except (ChannelError, ProtocolError) as error:
                self._fail(error)
                break
            # After a close from another thread, the reply belongs to none of the remaining tickets.
            with self._resolving:
                if self._broken is None:
                    self._flying.popleft().resolve(outcome)
        if self._broken is not None:
            ticket.resolve(self._broken)

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> Mailbox | None:
        return None

    def cut(self, why: str) -> None:
        self._why = why
        self._wake()

    def close(self) -> None:
        self._fail(ChannelError(f"{self.name}: the channel was closed"))

    def _fail(self, error: RaymoeError) -> None:
        if self._why is not None:
            error = ChannelError(f"{self.name}: {self._why}")
        with self._resolving:
            if self._broken is not None:
                return
            self._broken = error
        self._disconnect()
        while self._flying:
            self._flying.popleft().resolve(error)

    def _send(self, request: Request) -> None:
        """Send a request.

        Raises:
            ProtocolError, ResourceError: It cannot be written, and nothing was sent.
            ChannelError: The channel cannot be used any more.
        """
        raise NotImplementedError

    def _receive(self, deadline: float | None) -> Reply:
        """Wait for one reply until `deadline` (of `time.monotonic`).

        Raises:
            RemoteError: The reply is an error; the channel stays open.
            ChannelTimeout, ChannelError, ProtocolError: The channel cannot be used any more.
        """
        raise NotImplementedError

    def _disconnect(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    def _wake(self) -> None:
        """End `_receive` in another thread with a ChannelError, and every later one."""
        raise NotImplementedError


def call(handler: Handler, request: Request) -> Reply | Exception:
    """Call a handler; its reply, or the exception that is to be sent to the peer."""
    try:
        return handler(request)
    except Exception as error:
        return error


__all__ = ["MAX_IN_FLIGHT", "OrderedChannel", "OrderedTicket", "Reply", "call"]
