"""Mailboxes: small requests of inference through memory alone, beside a channel's socket.

A router's lane has one box for each expert host of its machine, with room for one request of few rows and
its reply. What a box cannot take, or the host refuses, goes over the channel, whose errors say why. A host
that has had no mail for a while sleeps on the socket, and the next sender knocks.

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
_WIDTH, _PAIRS, _SIZE = 48, 49, 50  # words that say what a box is, written once
_READY = 51  # the host's word that it looks into the box
_LOOKS: Final = 1000
"""Looks between which a waiting client makes sure that the host lives: about half a millisecond."""
_RESTLESS: Final = 20e-3  # seconds after which a client that waits sleeps between looks
_DTYPES: Final[dict[int, np.dtype[Any]]] = {4: np.dtype(np.float32), 8: np.dtype(np.float64)}


def size_of(width: int, pairs: int, dtype: np.dtype[Any]) -> int:
    """Bytes of a box for rows of `width` numbers and so many (row, expert) pairs."""
    return _places(width, pairs, dtype)[-1][1]


def box_at(memory: Array, width: int, pairs: int, dtype: np.dtype[Any]) -> Box:
    """The box that lies at the start of `memory` (bytes)."""
    parts = [
        memory[start:end].view(kind).reshape(shape)
        for start, end, kind, shape in _places(width, pairs, dtype)
    ]
    return Box(*parts)


def _places(
    width: int, pairs: int, dtype: np.dtype[Any]
) -> list[tuple[int, int, np.dtype[Any], tuple[int, ...]]]:
    """Start, end, dtype and shape of each part."""
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
    """The client's end, used by one thread at a time.

    Args:
        memory: zeros, of `size_of` bytes at least, which the host sees too.
        width: numbers of a row.
        pairs: room for (row, expert) pairs.
        dtype: float32 or float64.
        knock: wakes the host.
        alive: raises a ChannelError when the host has hung up.
    """

    def __init__(
        self,
        memory: Array,
        width: int,
        pairs: int,
        dtype: np.dtype[Any],
        *,
        knock: Callable[[], object],
        alive: Callable[[], object],
    ) -> None:
        self._box = box_at(memory, width, pairs, dtype)
        self._box.words[[_WIDTH, _PAIRS, _SIZE]] = width, pairs, dtype.itemsize
        self._token = np.zeros(MAX_MAILBOX_ROWS, np.int64)
        self._knock, self._alive = knock, alive
        self._number = self._rows = 0

    @property
    def ready(self) -> bool:
        """Whether the host has said that it looks into this box."""
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
        """Send what rows x [N, D] want of a host; the reply to the last request must have been collected.

        Args:
            idx, gates: [N, K].
            host_of: [R, E], and which of its values is this host; token n goes by row (n + shift) % R.
            call: epoch, step and layer.

        Returns:
            Rows sent; with none there is nothing to collect.
        """
        box = self._box
        sent, asleep = words_of.post(
            tuple(box), self._token, (x, idx, gates), (host_of, host, shift), (*call, self._number + 1)
        )
        if sent:
            self._number += 1
            self._rows = sent
            if asleep:
                self._knock()
        return int(sent)

    def collect(self, out: Array, timeout: float | None) -> bool:
        """Wait for the reply and add its rows to `out` [N, D]; whether the host has answered.

        Where it has refused, nothing is added: the same call over the channel tells why.

        Raises:
            ChannelTimeout: no reply within so many seconds (None waits for ever).
            ChannelError: the host has hung up.
        """
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
            if now - began > _RESTLESS:
                time.sleep(1e-3)

    def end(self) -> None:
        """Let a wait look at once whether the host lives: many looks take long where others want the core."""
        words_of.store(self._box.words, words_of.ENDED, 1)

    def rang(self) -> None:
        """A packet is about to be sent on the socket."""
        words = self._box.words
        words_of.store(words, words_of.RING, int(words[words_of.RING]) + 1)


class HostMailbox:
    """The host's end, used by one thread.

    Args:
        memory: bytes that a client may write at any time.

    Raises:
        ProtocolError: it is no box.
    """

    def __init__(self, memory: Array) -> None:
        if memory.nbytes < words_of.WORDS * 8:
            raise ProtocolError(f"a mailbox of {memory.nbytes} bytes is shorter than its head")
        width, pairs, size = memory[: words_of.WORDS * 8].view(np.int64)[[_WIDTH, _PAIRS, _SIZE]].tolist()
        dtype = _DTYPES.get(size)
        most = memory.nbytes
        if dtype is None or not (0 < width < most and 0 < pairs < most):
            raise ProtocolError(f"a mailbox of {most} bytes has no such shape: {width}, {pairs}, {size}")
        if size_of(width, pairs, dtype) > most:
            raise ProtocolError(f"a mailbox of {most} bytes is shorter than its {pairs} pairs of {width}")
        self.width, self.dtype = width, dtype
        self.box = box_at(memory, width, pairs, dtype)
        self.row_ptr = np.zeros(MAX_MAILBOX_ROWS + 1, np.int64)
        self.expert = np.zeros(pairs, np.int64)
        self._asked = self._answered = self._packets = 0

    def open(self) -> None:
        """Tell the client that requests will be answered."""
        words_of.store(self.box.words, _READY, 1)

    @property
    def call(self) -> tuple[int, int]:
        """Epoch and layer of the request."""
        words = self.box.words
        return int(words[words_of.EPOCH]), int(words[words_of.LAYER])

    def watch(self, looks: int) -> int:
        """`kernels.mailbox.watch` for this box; with mail, the next `reply` is to the request there is now.

        A client that has given one up may send another at any time, for which that reply must not pass.
        """
        found, asked = words_of.watch(self.box.words, self._answered, self._packets, looks)
        if found == words_of.MAIL:
            self._asked = asked
        return int(found)

    def accept(self, local_of: Array) -> tuple[int, int]:
        """Rows and pairs of the request, checked into `row_ptr` and `expert`; none where it cannot be."""
        box = self.box
        n, pairs = words_of.accept(box.words, box.row_ptr, box.expert, local_of, self.row_ptr, self.expert)
        return int(n), int(pairs)

    def reply(self, *, answered: bool) -> None:
        """The reply is in the box, or there is none."""
        words = self.box.words
        self._answered = self._asked
        words[words_of.STATUS] = words_of.ANSWERED if answered else words_of.REFUSED
        words_of.store(words, words_of.REPLY, self._answered)

    def rest(self) -> bool:
        """Ask to be woken; whether nothing has come in the meantime."""
        words_of.store(self.box.words, words_of.ASLEEP, 1)
        return self.watch(0) == words_of.NOTHING

    def packet_came(self) -> None:
        """A packet has been read from the socket."""
        words_of.store(self.box.words, words_of.ASLEEP, 0)
        self._packets += 1


class MailboxHandler(Protocol):
    """Answers a request in a mailbox with `HostMailbox.reply`; never raises."""

    def __call__(self, box: HostMailbox, /) -> None: ...


__all__ = ["HostMailbox", "MailboxHandler", "ShmMailbox", "box_at", "size_of"]
