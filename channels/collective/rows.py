"""Payloads between the two ranks of a process group of gloo.

Each tensor of a payload is a message, sent without a copy. Its receiver posts the receive in advance, while
it waits for a header: gloo's sender would otherwise wait for that when the rows are due. Receives are posted
for the next two payloads. Their sizes follow from the payloads before, which both ends know; the rest of a
larger tensor comes as a second message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed

from channels.collective.rendezvous import Rendezvous
from channels.framing.buffers import plain
from channels.framing.header import TensorSpan
from channels.framing.message_socket import MessageSocket, remaining
from channels.framing.scratch import Scratch, rounded
from errors import ChannelError, ChannelTimeout

_dist: Any = torch.distributed  # its stubs lack the classes below its functions

_SPARE: Final = 2
_AHEAD: Final = 2
"""Payloads for which receives are posted in advance."""
_MAX_ROOM: Final = 1 << 23
"""Most bytes of one posted receive; a connection holds twice as much for each large tensor of a payload."""
_ATTEMPTS: Final = 5
"""Attempts of gloo to connect a group, each with the group's timeout."""
_LATE: Final = 5.0
"""Seconds to wait for a payload after its header, beside the time that its bytes take."""
_SLOWEST: Final = 1e7
"""Least bytes per second of a payload. A wait for rows cannot be interrupted, and a peer may stop."""


class Rows:
    """One rank of a process group of two (gloo, between CPUs).

    Args:
        connection: For the rendezvous.
        rank: 0 or 1.
        peer: The peer's address, for messages.
        interface: Address of this machine to communicate over.
        timeout: Seconds for the group to form.

    Raises:
        ChannelError: The group does not form.
    """

    def __init__(
        self, connection: MessageSocket, rank: int, peer: str, interface: str, timeout: float
    ) -> None:
        self._peer, self._name = 1 - rank, peer
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout / _ATTEMPTS)  # waits for rows have timeouts of their own
        rendezvous = Rendezvous(connection, time.monotonic() + timeout)
        try:
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=interface)]
            self._group = _dist.ProcessGroupGloo(rendezvous, rank, 2, options)
        except RuntimeError as error:
            raise ChannelError(f"no process group with {peer}: {_first_line(error)}") from None
        self._out: list[_PostedSizes] = []  # the peer's posted receives, for each tensor of a payload
        self._in: list[_Receiver] = []
        self._leaving: deque[tuple[list[Any], Sequence[torch.Tensor]]] = deque()
        self._left = 0  # payloads that the peer has received
        self._closed = False
        self.received = 0
        """Payloads that have been received."""

    def send(self, tensors: Sequence[torch.Tensor], announce: Callable[[], None]) -> None:
        """Begin to send a payload; its tensors stay as they are until the peer has received it.

        Args:
            announce: Sends the header; the peer wakes up and prepares while the rows are in flight.

        Raises:
            ChannelError: The peer closed the connection.
        """
        while len(self._out) < len(tensors):
            self._out.append(_PostedSizes())
        whole = [plain(tensor) for tensor in tensors]
        announce()
        works, beyond = [], []
        for place, (tensor, posted) in enumerate(zip(whole, self._out, strict=False)):
            size = tensor.nbytes
            room = posted.take(size)
            if size <= room:
                works.append(self._send(tensor, 2 * place))
                continue
            flat = tensor.reshape(-1).view(torch.uint8)
            if room:
                works.append(self._send(flat[:room], 2 * place))
            beyond.append((flat[room:], 2 * place + 1))
        self._leaving.append((works, whole))
        works += [self._send(part, tag) for part, tag in beyond]

    def arrived(self, payloads: int) -> None:
        """Free the payloads that the peer has received: gloo itself does not report what was sent."""
        while self._leaving and self._left < payloads:
            self._leaving.popleft()
            self._left += 1

    def post_ahead(self) -> None:
        """Post receives for the next payloads; to be called before each wait for a header.

        Raises:
            ChannelError: The peer closed the connection.
        """
        for receiver in list(self._in):
            receiver.post_ahead()

    def receive(self, spans: Sequence[TensorSpan], deadline: float | None) -> list[torch.Tensor]:
        """The tensors of a payload, in memory that is not reused while something is a view of it.

        Args:
            spans: Each at the beginning of memory of its own.

        Raises:
            ChannelTimeout: They did not come until `deadline`.
            ChannelError: The peer closed the connection.
        """
        while len(self._in) < len(spans):
            self._in.append(_Receiver(self, len(self._in)))
        receivers = self._in[: len(spans)]
        if self._closed or len(receivers) < len(spans):  # by another thread
            raise ChannelError(f"{self._name}: the channel was closed")
        found = [receiver.receive(where, deadline) for receiver, where in zip(receivers, spans, strict=True)]
        self.received += 1
        return found

    def close(self) -> None:
        """Forget the posted receives."""
        self._closed = True
        self._in.clear()  # each refers to this object: a cycle would live until the collector runs
        self._leaving.clear()

    def post(self, memory: torch.Tensor, tag: int) -> Any:
        """Post a receive for the next tensor with this tag; gloo's work, which has to be kept."""
        try:
            return self._group.recv([memory], self._peer, tag)
        except RuntimeError as error:
            raise ChannelError(f"{self._name} closed the connection; has its process ended?") from error

    def wait(self, work: Any, size: int, deadline: float | None) -> None:
        """Wait for a tensor of `size` bytes; raises as `receive` does."""
        limit = _LATE + size / _SLOWEST
        try:
            if deadline is not None:
                limit = min(limit, remaining(deadline) or limit)
            work.wait(timedelta(seconds=limit))
        except TimeoutError:
            raise ChannelTimeout(f"{self._name} does not answer") from None
        except RuntimeError as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise ChannelTimeout(f"{self._name} does not answer") from None
            raise ChannelError(f"{self._name} stalled or is gone; has its process ended?") from error

    def _send(self, part: torch.Tensor, tag: int) -> Any:
        try:
            return self._group.send([part], self._peer, tag)
        except RuntimeError as error:
            raise ChannelError(f"{self._name} closed the connection; has its process ended?") from error


class _PostedSizes:
    """Sizes of the posted receives for the tensors at one place of a payload, from the sizes of those before.

    Both ends of a connection compute the same sizes.
    """

    __slots__ = ("_rooms", "latest")

    def __init__(self) -> None:
        self.latest = 0
        """Bytes of the next receive that is posted."""
        self._rooms = deque([0] * _AHEAD)

    def take(self, size: int) -> int:
        """Bytes of the receive that was posted for a tensor of `size` bytes."""
        self.latest = max(self.latest, min(_MAX_ROOM, rounded(size)))
        self._rooms.append(self.latest)
        return self._rooms.popleft()


class _Receiver:
    """Receives the tensors at one place of a payload, with receives posted for the next ones."""

    def __init__(self, rows: Rows, place: int) -> None:
        self._rows, self._tag = rows, 2 * place
        self._scratch = Scratch(_SPARE)
        self._posted = _PostedSizes()
        # gloo's work and its memory; None if no receive was posted
        self._coming: deque[tuple[Any, torch.Tensor] | None] = deque([None] * _AHEAD)

    def post_ahead(self) -> None:
        while len(self._coming) < _AHEAD:
            room = self._posted.latest
            memory = self._scratch.take(room)
            self._coming.append((self._rows.post(memory[:room], self._tag), memory))

    def receive(self, where: TensorSpan, deadline: float | None) -> torch.Tensor:
        size, room = where.end, self._posted.take(where.end)
        coming = self._coming.popleft()
        if coming is None:
            memory = self._scratch.take(size)
            self._rows.wait(self._rows.post(memory[:size], self._tag + 1), size, deadline)
            return self._scratch.lend(memory, where)
        work, memory = coming
        if size <= room:
            tensor = self._scratch.lend(memory, where)  # while the rows are in flight
            self._rows.wait(work, size, deadline)
            return tensor
        whole = self._scratch.take(size)
        self._rows.wait(work, room, deadline)
        whole[:room].copy_(memory[:room])
        self._scratch.give(memory)
        self._rows.wait(self._rows.post(whole[room:size], self._tag + 1), size - room, deadline)
        return self._scratch.lend(whole, where)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["Rows"]
