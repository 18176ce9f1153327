"""Payloads between the two ranks of a process group, whose rendezvous goes over the line between the two.

A payload is one message. Its receiver has asked for it before it is sent: gloo's receive says so to the
sender, who would otherwise wait for that once the rows are due. How much has been asked for follows from
the payloads before it, which both ends know; what is beyond comes as a second message.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed

from channels.codec import plain
from channels.header import ALIGNMENT
from channels.line import Head, Line, remaining
from channels.scratch import Scratch, rounded
from errors import ChannelError, ChannelTimeout, ProtocolError

_dist: Any = torch.distributed  # whose stubs do not know the classes below its functions

_SPARE: Final = 2  # of each direction
_ROOM: Final = 1 << 16
_MAX_ROOM: Final = 1 << 23
"""Bytes asked for in advance, at first and at most: each connection holds so much for each direction."""
_PATIENCE: Final = timedelta(days=1)  # of the group; waits have limits of their own
_LATE: Final = 10.0
"""Seconds that a payload takes after its header at most, and one more for every"""
_SLOWEST: Final = 1e7
"""bytes. Who waits for rows cannot be woken, and a peer may be stopped in the middle of them."""


class _Meeting(_dist.Store):  # type: ignore[misc]
    """What the two ends of a line tell each other for a group to form: a store without a port of its own."""

    def __init__(self, line: Line, deadline: float) -> None:
        super().__init__()
        self._line, self._deadline = line, deadline
        self._known: dict[str, bytes] = {}
        self._guard = threading.RLock()

    def set(self, key: str, value: Any) -> None:
        """Tell both ends."""
        told = value.encode() if isinstance(value, str) else bytes(value)
        with self._guard:
            self._known[key] = told
            name = key.encode()
            self._line.write(Head(name, len(told), told))

    def get(self, key: str) -> bytes:
        """Wait for what either end tells."""
        with self._guard:
            while key not in self._known:
                told = self._line.read(self._deadline)
                if told.size != len(told.inline):
                    raise ProtocolError(f"{told.size} bytes for a group to form")
                self._known[told.text.decode("utf-8", "replace")] = told.inline
            return self._known[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Until all are told."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all have been told, as far as this end knows."""
        return all(key in self._known for key in keys)


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

    def __init__(self, line: Line, rank: int, peer: str, interface: str, timeout: float) -> None:
        self._peer, self._name = 1 - rank, peer
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=interface)]
        options._timeout = _PATIENCE
        meeting = _Meeting(line, time.monotonic() + timeout)
        try:
            self._group = _dist.ProcessGroupGloo(meeting, rank, 2, options)
        except RuntimeError as error:
            raise ChannelError(f"no process group with {peer}: {_first_line(error)}") from None
        self._out, self._in = Scratch(_SPARE), Scratch(_SPARE)
        self._leaving: deque[tuple[list[Any], torch.Tensor]] = deque()
        self._left = 0  # payloads that the peer has
        self.received = 0
        """Payloads that have come."""
        self._asked = self._asked_of_us = _ROOM
        self._ask()

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to send a payload; the tensors are the caller's again at once.

        Raises:
            ChannelError: the peer hung up.
        """
        offsets, total = stacked([tensor.nbytes for tensor in tensors])
        memory = self._out.take(total)
        for tensor, at in zip(tensors, offsets, strict=True):
            memory[at : at + tensor.nbytes].copy_(as_bytes(tensor))
        cut = min(total, self._asked_of_us)
        parts = [memory[:cut], memory[cut:total]] if cut < total else [memory[:cut]]
        try:
            self._leaving.append(([self._group.send([part], self._peer, 0) for part in parts], memory))
        except RuntimeError as error:
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error
        self._asked_of_us = _grown(self._asked_of_us, total)

    def arrived(self, received: int) -> None:
        """The peer says how many payloads it has: gloo itself does not tell what has left."""
        while self._leaving and self._left < received:
            self._out.give(self._leaving.popleft()[1])
            self._left += 1

    def receive(self, total: int, deadline: float | None) -> np.ndarray[Any, Any]:
        """A payload of `total` bytes, in memory that stays as it is while something is a view of it.

        Raises:
            ChannelTimeout: not until `deadline`.
            ChannelError: the peer hung up.
        """
        work, memory = self._coming
        self._wait(work, total, deadline)
        if total > self._asked:
            whole = self._in.take(total)
            whole[: self._asked].copy_(memory[: self._asked])
            self._in.give(memory)
            memory = whole
            self._wait(self._receive(memory[self._asked : total]), total, deadline)
        self.received += 1
        self._asked = _grown(self._asked, total)
        self._ask()
        return self._in.lend(memory)

    def _ask(self) -> None:
        memory = self._in.take(self._asked)
        self._coming = (self._receive(memory[: self._asked]), memory)

    def _receive(self, memory: torch.Tensor) -> Any:
        try:
            return self._group.recv([memory], self._peer, 0)
        except RuntimeError as error:
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error

    def _wait(self, work: Any, total: int, deadline: float | None) -> None:
        limit = _LATE + total / _SLOWEST
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


def stacked(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of so many bytes begin, one after the other and aligned, and the last one's end."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + size
    return offsets, end


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory, which need not be of a type that gloo knows."""
    return plain(tensor).reshape(-1).view(torch.uint8)


def _grown(asked: int, total: int) -> int:
    """What is asked for after a payload of so many bytes; the same at both ends."""
    return max(asked, min(_MAX_ROOM, rounded(total)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["Rows", "as_bytes", "stacked"]
