"""Payloads between the two ranks of a process group, whose rendezvous goes over the line between the two.

Each tensor of a payload is a message, sent as it lies. Its receiver has asked for it in advance: gloo's
receive says so to the sender, who would otherwise wait for that once the rows are due. It asks for the next
two, and while it waits for a header, when nobody waits for it. How much has been asked for follows from the
payloads before the last one, which both ends know; what is beyond comes as a second message.
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

_dist: Any = torch.distributed  # whose stubs do not know the classes below its functions

_SPARE: Final = 2
_AHEAD: Final = 2
"""Payloads that are asked for in advance."""
_MAX_ROOM: Final = 1 << 23
"""Bytes asked for at a time, at most: a connection holds twice as much for each large tensor of a payload."""
_ATTEMPTS: Final = 5
"""That gloo makes to connect a group, with a group's time limit for each."""
_LATE: Final = 5.0
"""Seconds that a payload takes after its header at most, and one more for every"""
_SLOWEST: Final = 1e7
"""bytes. Who waits for rows cannot be woken, and a peer may be stopped in the middle of them."""


class Rows:
    """One rank of a process group of two (gloo, between CPUs).

    Args:
        rank: 0 or 1.
        peer: who is at the other end, for messages.
        interface: address of this machine to talk over.
        timeout: seconds for the group to form.

    Raises:
        ChannelError: it does not form.
    """

    def __init__(self, line: MessageSocket, rank: int, peer: str, interface: str, timeout: float) -> None:
        self._peer, self._name = 1 - rank, peer
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout / _ATTEMPTS)  # waits for rows have limits of their own
        meeting = Rendezvous(line, time.monotonic() + timeout)
        try:
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=interface)]
            self._group = _dist.ProcessGroupGloo(meeting, rank, 2, options)
        except RuntimeError as error:
            raise ChannelError(f"no process group with {peer}: {_first_line(error)}") from None
        self._out: list[_Asked] = []  # of the tensors of a payload, what the peer has asked for
        self._in: list[_Inlet] = []
        self._leaving: deque[tuple[list[Any], Sequence[torch.Tensor]]] = deque()
        self._left = 0  # payloads that the peer has
        self._closed = False
        self.received = 0
        """Payloads that have come."""

    def send(self, tensors: Sequence[torch.Tensor], announce: Callable[[], None]) -> None:
        """Begin to send a payload, whose tensors stay as they are until the peer says that it has come.

        Args:
            announce: tells the peer of it, who wakes up and makes ready while the rows are on their way.

        Raises:
            ChannelError: the peer hung up.
        """
        while len(self._out) < len(tensors):
            self._out.append(_Asked())
        whole = [plain(tensor) for tensor in tensors]
        announce()
        works, beyond = [], []
        for place, (tensor, asked) in enumerate(zip(whole, self._out, strict=False)):
            size = tensor.nbytes
            room = asked.take(size)
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
        """The peer says how many it has: gloo itself does not tell what has left."""
        while self._leaving and self._left < payloads:
            self._leaving.popleft()
            self._left += 1

    def ask_ahead(self) -> None:
        """Ask for the payloads after those that have come; to be called before each header is waited for.

        Raises:
            ChannelError: the peer hung up.
        """
        for inlet in list(self._in):
            inlet.ask_ahead()

    def receive(self, spans: Sequence[TensorSpan], deadline: float | None) -> list[torch.Tensor]:
        """The tensors of a payload, in memory that stays as it is while something is a view of it.

        Args:
            spans: each at the beginning of memory of its own.

        Raises:
            ChannelTimeout: not until `deadline`.
            ChannelError: the peer hung up.
        """
        while len(self._in) < len(spans):
            self._in.append(_Inlet(self, len(self._in)))
        inlets = self._in[: len(spans)]
        if self._closed or len(inlets) < len(spans):  # by another thread
            raise ChannelError(f"{self._name}: the channel was closed")
        found = [inlet.receive(where, deadline) for inlet, where in zip(inlets, spans, strict=True)]
        self.received += 1
        return found

    def close(self) -> None:
        """Hang up: what has been asked for, and not come, is forgotten."""
        self._closed = True
        self._in.clear()  # each knows this, which would be there until the collector comes
        self._leaving.clear()

    def ask(self, memory: torch.Tensor, tag: int) -> Any:
        """Ask the peer for its next tensor with this tag: gloo's work, to hold on to."""
        try:
            return self._group.recv([memory], self._peer, tag)
        except RuntimeError as error:
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error

    def wait(self, work: Any, size: int, deadline: float | None) -> None:
        """Until a tensor of so many bytes is there; see `receive`."""
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
            raise ChannelError(f"{self._name} hung up or stalled; has its process ended?") from error

    def _send(self, part: torch.Tensor, tag: int) -> Any:
        try:
            return self._group.send([part], self._peer, tag)
        except RuntimeError as error:
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error


class _Asked:
    """What a receiver has asked for of the tensors of one place within a payload, by the sizes that came.

    The two ends of a connection have one each, which say the same.
    """

    __slots__ = ("_rooms", "latest")

    def __init__(self) -> None:
        self.latest = 0
        """Bytes that are asked for once the last payload has come."""
        self._rooms = deque([0] * _AHEAD)

    def take(self, size: int) -> int:
        """Bytes that had been asked for of a payload that has so many."""
        self.latest = max(self.latest, min(_MAX_ROOM, rounded(size)))
        self._rooms.append(self.latest)
        return self._rooms.popleft()


class _Inlet:
    """Where the tensors of one place within a payload come in, the next of which have been asked for."""

    def __init__(self, rows: Rows, place: int) -> None:
        self._rows, self._tag = rows, 2 * place
        self._scratch = Scratch(_SPARE)
        self._asked = _Asked()
        # gloo's work, and where it comes; None: nothing has been asked for
        self._coming: deque[tuple[Any, torch.Tensor] | None] = deque([None] * _AHEAD)

    def ask_ahead(self) -> None:
        """See `Rows.ask_ahead`."""
        while len(self._coming) < _AHEAD:
            room = self._asked.latest
            memory = self._scratch.take(room)
            self._coming.append((self._rows.ask(memory[:room], self._tag), memory))

    def receive(self, where: TensorSpan, deadline: float | None) -> torch.Tensor:
        """See `Rows.receive`."""
        size, room = where.end, self._asked.take(where.end)
        coming = self._coming.popleft()
        if coming is None:
            memory = self._scratch.take(size)
            self._rows.wait(self._rows.ask(memory[:size], self._tag + 1), size, deadline)
            return self._scratch.lend(memory, where)
        work, memory = coming
        if size <= room:
            tensor = self._scratch.lend(memory, where)  # made while the rows are on their way
            self._rows.wait(work, size, deadline)
            return tensor
        whole = self._scratch.take(size)
        self._rows.wait(work, room, deadline)
        whole[:room].copy_(memory[:room])
        self._scratch.give(memory)
        self._rows.wait(self._rows.ask(whole[room:size], self._tag + 1), size - room, deadline)
        return self._scratch.lend(whole, where)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["Rows"]
