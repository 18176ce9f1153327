"""Mailboxes: small requests of inference through shared memory alone, beside a channel's socket.

A router's lane has one mailbox for each expert host of its machine, with room for one request of few rows and
its reply. A request that has no room, or that the host refuses, goes over the channel, whose errors give the
reason. A host that has had no request in its mailbox for a while sleeps on the socket, and the next sender
wakes it.

The layout of the memory is `kernels.mailbox`'s words, then row_ptr, experts, gates, rows and replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np

from channels.base import MAX_MAILBOX_ROWS, Array
from errors import ChannelTimeout, ProtocolError
from kernels import mailbox as words_of
from kernels.mailbox import Box

_ALIGNMENT: Final = 64
_WIDTH, _PAIRS, _SIZE = 48, 49, 50  # words with the mailbox's shape, written once
_READY = 51  # word that the host sets when it reads the mailbox
_LOOKS: Final = 1000
"""Reads of the mailbox between two checks of whether the host lives: about half a millisecond."""
_POLL_SECONDS: Final = 20e-3  # after which a waiting client sleeps between reads
_DTYPES: Final[dict[int, np.dtype[Any]]] = {4: np.dtype(np.float32), 8: np.dtype(np.float64)}


def size_of(width: int, pairs: int, dtype: np.dtype[Any]) -> int:
    """Bytes of a mailbox for rows of `width` numbers and `pairs` (row, expert) pairs."""
    return _places(width, pairs, dtype)[-1][1]


def box_at(memory: Array, width: int, pairs: int, dtype: np.dtype[Any]) -> Box:
    """The arrays of the mailbox at the start of `memory` (bytes)."""
    parts = [
        memory[start:end].view(kind).reshape(shape)
        for start, end, kind, shape in _places(width, pairs, dtype)
    ]
    return Box(*parts)


def _places(
    width: int, pairs: int, dtype: np.dtype[Any]
) -> list[tuple[int, int, np.dtype[Any], tuple[int, ...]]]:
    """Start, end, dtype and shape of each array."""
    parts: tuple[tuple[np.dtype[Any], tuple[int, ...]], ...] = (
        (np.dtype(np.int64), (words_of.WORDS,)),
        (np.dtype(np.int32), (MAX_MAILBOX_ROWS + 1,)),
        (np.dtype(np.int32), (pairs,)),
        (dtype, (pairs,)),
        (dtype, (MAX_MAILBOX_ROWS, width)),
        (dtype, (MAX_MAILBOX_ROWS, width)),
    )
    found = []
    end = 0
    for kind, shape in parts:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + int(np.prod(shape)) * kind.itemsize
        found.append((start, end, kind, shape))
    return found


class ShmMailbox:
    """The client's end of a mailbox, used by one thread at a time.

    Args:
        memory: Zeros, of `size_of` bytes at least, shared with the host.
        width: Numbers of a row.
        pairs: Room for (row, expert) pairs.
        dtype: float32 or float64.
        wake: Wakes the host.
        alive: Raises a ChannelError if the host has closed the connection.
    """

    def __init__(
        self,
        memory: Array,
        width: int,
        pairs: int,
        dtype: np.dtype[Any],
        *,
        wake: Callable[[], object],
        alive: Callable[[], object],
    ) -> None:
        self._box = box_at(memory, width, pairs, dtype)
        self._box.words[[_WIDTH, _PAIRS, _SIZE]] = width, pairs, dtype.itemsize
        self._token = np.zeros(MAX_MAILBOX_ROWS, np.int64)
        self._wake, self._alive = wake, alive
        self._number = self._rows = 0

    @property
    def ready(self) -> bool:
        return bool(words_of.load(self._box.words, _READY))

    def post(
        self,
        x: Array,
        idx: Array,
        gates: Array,
        host_of: Array,
        host: int,
        call: tuple[int, int, int],
        shift: int = 0,
    ) -> int:
        box = self._box
        sent, asleep = words_of.post(
            tuple(box), self._token, (x, idx, gates), (host_of, host, shift), (*call, self._number + 1)
        )
        if sent:
            self._number += 1
            self._rows = sent
            if asleep:
                self._wake()
        return int(sent)

    def collect(self, out: Array, timeout: float | None) -> bool:
        box, began = self._box, 0.0
        while True:
            found = words_of.collect(
                box.words, box.partial, self._token, self._rows, self._number, _LOOKS, out
            )
            if found != words_of.PENDING:
                return bool(found == words_of.ANSWERED)
            self._alive()
            now = time.monotonic()
            began = began or now
            if timeout is not None and now - began > timeout:
                raise ChannelTimeout(f"no reply within {timeout:g} s")
            if now - began > _POLL_SECONDS:
                time.sleep(1e-3)

    def end(self) -> None:
        """Let a wait check at once whether the host lives, instead of after many more reads."""
        words_of.store(self._box.words, words_of.ENDED, 1)

    def count_packet(self) -> None:
        """Count a packet that is about to be sent on the socket."""
        words = self._box.words
        words_of.store(words, words_of.RING, int(words[words_of.RING]) + 1)


class HostMailbox:
    """The host's end of a mailbox, used by one thread.

    Args:
        memory: Bytes that a client may write at any time.

    Raises:
        ProtocolError: The memory has not the shape of a mailbox.
    """

    def __init__(self, memory: Array) -> None:
        if memory.nbytes < words_of.WORDS * 8:
            raise ProtocolError(f"a mailbox of {memory.nbytes} bytes is shorter than its head")
        width, pairs, size = memory[: words_of.WORDS * 8].view(np.int64)[[_WIDTH, _PAIRS, _SIZE]].tolist()
        dtype = _DTYPES.get(size)
        most = memory.nbytes
        if dtype is None or not (0 < width < most and 0 < pairs < most):
            raise ProtocolError(
                f"a mailbox of {most} bytes cannot hold {pairs} pairs of {width} numbers of {size} bytes"
            )
        if size_of(width, pairs, dtype) > most:
            raise ProtocolError(f"a mailbox of {most} bytes is shorter than its {pairs} pairs of {width}")
        self.width, self.dtype = width, dtype
        self.box = box_at(memory, width, pairs, dtype)
        self.row_ptr = np.zeros(MAX_MAILBOX_ROWS + 1, np.int64)
        self.expert = np.zeros(pairs, np.int64)
        self._asked = self._answered = self._packets = 0

    def open(self) -> None:
        """Tell the client that the host reads this mailbox."""
        words_of.store(self.box.words, _READY, 1)

    @property
    def call(self) -> tuple[int, int]:
        """Epoch and layer of the request."""
        words = self.box.words
        return int(words[words_of.EPOCH]), int(words[words_of.LAYER])

    def watch(self, looks: int) -> int:
        """`kernels.mailbox.watch` for this mailbox; the next `reply` answers the request that is there now.

        A client that has given up a request may write another one at any time, which that reply must not
        answer.
        """
        found, asked = words_of.watch(self.box.words, self._answered, self._packets, looks)
        if found == words_of.MAIL:
            self._asked = asked
        return int(found)

    def accept(self, local_of: Array) -> tuple[int, int]:
        """Check the request and copy it into `row_ptr` and `expert`; its rows and pairs, none if invalid."""
        box = self.box
        n, pairs = words_of.accept(box.words, box.row_ptr, box.expert, local_of, self.row_ptr, self.expert)
        return int(n), int(pairs)

    def reply(self, *, answered: bool) -> None:
        """Answer the request with the rows in the mailbox, or refuse it."""
        words = self.box.words
        self._answered = self._asked
        words[words_of.STATUS] = words_of.ANSWERED if answered else words_of.REFUSED
        words_of.store(words, words_of.REPLY, self._answered)

    def rest(self) -> bool:
        """Ask to be woken before sleeping; whether no request has come in the meantime."""
        words_of.store(self.box.words, words_of.ASLEEP, 1)
        return self.watch(0) == words_of.NOTHING

    def count_received(self) -> None:
        """Count a packet that has been read from the socket."""
        words_of.store(self.box.words, words_of.ASLEEP, 0)
        self._packets += 1


class MailboxHandler(Protocol):
    """A host's answer to a request in a mailbox, given with `HostMailbox.reply`; never raises."""

    def __call__(self, box: HostMailbox, /) -> None: ...


__all__ = ["HostMailbox", "MailboxHandler", "ShmMailbox", "box_at", "size_of"]
