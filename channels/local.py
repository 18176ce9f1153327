"""The channel within a process: a call of the handler. Also the test double of the other channels.

It behaves like a channel over a wire: the handler's tensors have no autograd history, errors arrive as from
another process, and the caller owns the tensors of a reply.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import torch

from channels.base import Channel, Handler, Mailbox, Request
from channels.framing import header as headers
from channels.locality import process_id
from errors import ChannelError, RemoteError

_servers: Final[dict[str, LocalServer]] = {}
_numbers: Final = itertools.count()


class LocalServer:
    """A handler that channels of this process find by its address."""

    def __init__(self, handler: Handler) -> None:
        self.handler: Handler | None = handler
        self._address = f"local:{process_id()}/{next(_numbers)}"
        _servers[self._address] = self

    @property
    def address(self) -> str:
        """`local:<process>/<number>`, valid within this process only."""
        return self._address

    def close(self) -> None:
        """Refuse all later requests."""
        _servers.pop(self._address, None)
        self.handler = None


class LocalTicket:
    """A reply, or the error in its place."""

    def __init__(self, outcome: tuple[torch.Tensor, ...] | Exception) -> None:
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> tuple[torch.Tensor, ...]:
        """The reply; raises its error; never waits."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class LocalChannel:
    """Calls the handler in the caller's thread, within `submit`."""

    def __init__(self, server: LocalServer) -> None:
        self._server = server
        self._closed: str | None = None

    def submit(self, request: Request) -> LocalTicket:
        """Call the handler; the ticket raises its error."""
        handler = self._server.handler
        if self._closed or handler is None:
            raise ChannelError(f"{self._server.address} {self._closed or 'is closed; connect again'}")
        headers.request_text(request.id, headers.layout(request.tensors))  # raises what a wire would
        bare = tuple(tensor.detach() for tensor in request.tensors)
        try:
            reply = handler(Request(id=request.id, tensors=bare))
            # The handler may reuse its buffers, and the caller may write into the reply.
            return LocalTicket(tuple(tensor.detach().clone() for tensor in reply))
        except Exception as error:
            return LocalTicket(_as_from_afar(error))

    def takes(self, device: torch.device) -> bool:
        """True for every device: tensors are not copied on the way."""
        return True

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> Mailbox | None:
        return None

    def cut(self, why: str) -> None:
        """Refuse later requests; a call of the handler cannot be interrupted."""
        self._closed = f"is cut: {why}"

    def close(self) -> None:
        """Refuse later requests."""
        self._closed = self._closed or "is closed; connect again"


def _as_from_afar(error: Exception) -> Exception:
    try:
        headers.read_reply(headers.error_text(error), 0)
    except RemoteError as remote:
        return remote
    return error


def serve(handler: Handler) -> LocalServer:
    """Serve `handler` to channels of this process."""
    return LocalServer(handler)


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """Open a channel to a server of this process.

    Raises:
        ChannelError: There is no such server in this process.
    """
    server = _servers.get(address)
    if server is None:
        raise ChannelError(f"no server at {address} in this process ({process_id()}); use shm or grpc")
    return LocalChannel(server)


__all__ = ["LocalChannel", "LocalServer", "LocalTicket", "connect", "serve"]
