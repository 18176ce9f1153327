"""What channels over a wire share: requests in flight, whose replies come in order."""

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
"""Requests that a channel leaves unread; the next `submit` first reads the oldest reply, so that the
two ends never wait for one another with both directions full."""


class OrderedTicket:
    """A reply that is on its way through a pipe."""

    __slots__ = ("_outcome", "_pipe")

    def __init__(self, pipe: OrderedChannel) -> None:
        self._pipe = pipe
        self._outcome: Reply | RaymoeError | None = None

    def resolve(self, outcome: Reply | RaymoeError) -> None:
        """The reply, or why there will be none; the first one counts."""
        if self._outcome is None:
            self._outcome = outcome

    def result(self, timeout: float | None = None) -> Reply:
        """See `channels.base.Ticket`."""
        if self._outcome is None:
            self._pipe.wait_for(self, timeout)
        outcome = self._outcome
        if outcome is None:
            raise ChannelError(f"{self._pipe.name}: the reply was not waited for to its end")
        if isinstance(outcome, RaymoeError):
            raise outcome
        return outcome

    @property
    def resolved(self) -> bool:
        """Whether `result` returns at once."""
        return self._outcome is not None


class OrderedChannel:
    """The client's end. A subclass sends, receives and hangs up; this keeps order and failures.

    Attributes:
        name: the peer's address, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._flying: deque[OrderedTicket] = deque()
        self._broken: RaymoeError | None = None
        self._why: str | None = None  # it was cut
        self._resolving = threading.Lock()

    def submit(self, request: Request) -> OrderedTicket:
        """See `channels.base.Channel`."""
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
        except (ProtocolError, ResourceError):  # nothing has left: it could not be written
            self._flying.pop()
            raise
        except BaseException as error:  # nobody knows whether it has: no reply could be told from another
            self._fail(ChannelError(f"{self.name}: closed in the middle of a request ({error!r})"))
            raise
        return ticket

    def wait_for(self, ticket: OrderedTicket, timeout: float | None) -> None:
        """Settle every ticket up to `ticket`; a failure settles all, and closes the pipe."""
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
            # A close from another thread may be emptying the queue: this is a reply to none of what is left.
            with self._resolving:
                if self._broken is None:
                    self._flying.popleft().resolve(outcome)
        if self._broken is not None:
            ticket.resolve(self._broken)

    def takes(self, device: torch.device) -> bool:
        """See `channels.base.Channel`."""
        return device.type == "cpu"

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> Mailbox | None:
        return None

    def cut(self, why: str) -> None:
        self._why = why
        self._wake()

    def close(self) -> None:
        """See `channels.base.Channel`."""
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
        raise NotImplementedError

    def _receive(self, deadline: float | None) -> Reply:
        """Wait for one reply until `deadline` (of `time.monotonic`).

        Raises:
            RemoteError: the reply is an error; the pipe goes on.
            ChannelTimeout, ChannelError, ProtocolError: the pipe is of no use any more.
        """
        raise NotImplementedError

    def _disconnect(self) -> None:
        raise NotImplementedError

    def _wake(self) -> None:
        """Let `_receive` in another thread end with a ChannelError, and every later one."""
        raise NotImplementedError


def call(handler: Handler, request: Request) -> Reply | Exception:
    """Call a handler for a peer, who is to hear of any failure."""
    try:
        return handler(request)
    except Exception as error:
        return error


__all__ = ["MAX_IN_FLIGHT", "OrderedChannel", "OrderedTicket", "Reply", "call"]
