"""Requests and replies in memory that a client and an expert host share, without system calls.

The client fills a box and increases the number of its request; the host replies and increases the number of
its reply. Both poll and yield the core between two looks, since cores may be fewer than processes.
Values that the other process writes are read once and checked against the size of the box.

Shapes: n rows of D numbers, nnz (row, expert) pairs; a box has room for B rows and P pairs; R ways to
choose one replica of every expert.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy.typing as npt

from kernels import atomics
from kernels.compiled import compiled

Array = npt.NDArray[Any]

# Words of a box's head, each in a cache line of its own where both ends write.
REQUEST: Final = 0
REPLY: Final = 8
ASLEEP: Final = 16  # 1 while the host waits on its socket and has to be woken
RING: Final = 24  # number of packets that the client has sent on the socket
STATUS: Final = 32
EPOCH, STEP, LAYER, ROWS, PAIRS = (40, 41, 42, 43, 44)
ENDED: Final = 52  # 1 after the client's connection was closed: its threads stop waiting
WORDS: Final = 64

NOTHING, MAIL, PACKET = (0, 1, 2)
PENDING, ANSWERED, REFUSED = (0, 1, 2)


class Box(NamedTuple):
    """The parts of a mailbox: views of memory that client and host share.

    Attributes:
        words: [64] int64, the head.
        row_ptr: [B + 1] int32, the pairs of row i are row_ptr[i] … row_ptr[i + 1].
        expert: [P] int32, expert of each pair.
        gate: [P], gate of each pair.
        rows: [B, D], rows of the request.
        partial: [B, D], rows of the reply.
    """

    words: Array
    row_ptr: Array
    expert: Array
    gate: Array
    rows: Array
    partial: Array


class RoutedRows(NamedTuple):
    """Rows of N tokens, and the experts that they go to.

    Attributes:
        x: [N, D].
        idx: [N, K], experts.
        gates: [N, K].
    """

    x: Array
    idx: Array
    gates: Array


class Recipient(NamedTuple):
    """The host that a request goes to.

    Attributes:
        host_of: [R, E] int64, a host of each expert; token n goes by row (n + shift) % R.
        host: the value of this host in `host_of`.
        shift: 0 or more.
    """

    host_of: Array
    host: int
    shift: int


class CallNumbers(NamedTuple):
    """Epoch, step and layer of a request, and its number in the box."""

    epoch: int
    step: int
    layer: int
    number: int


@compiled
def load(words, index):
    """Read a word that the other process may write."""
    return atomics.load(words, index)


@compiled
def store(words, index, value):
    """Write a word that the other process may read; it then also sees all that was written before."""
    atomics.store(words, index, value)


@compiled
def post(box, token, routed, recipient, call):
    """Fill a box with the pairs of one host, and send it.

    Args:
        box: a `Box` as a plain tuple; it has room for N rows and their pairs.
        token: [B] int64, written: the token of each row.
        routed: a `RoutedRows` as a plain tuple.
        recipient: a `Recipient` as a plain tuple.
        call: a `CallNumbers` as a plain tuple.

    Returns:
        Number of rows sent, and whether the host sleeps. Without a token for the host, nothing is sent.
    """
    b, tokens, to, numbers = Box(*box), RoutedRows(*routed), Recipient(*recipient), CallNumbers(*call)
    n = pairs = 0
    b.row_ptr[0] = 0
    ways = to.host_of.shape[0]
    way = to.shift % ways
    here = to.host_of[way]
    for i in range(tokens.x.shape[0]):
        before = pairs
        for k in range(tokens.idx.shape[1]):
            if here[tokens.idx[i, k]] == to.host:
                b.expert[pairs], b.gate[pairs] = tokens.idx[i, k], tokens.gates[i, k]
                pairs += 1
        if pairs > before:
            for d in range(tokens.x.shape[1]):
                b.rows[n, d] = tokens.x[i, d]
            token[n] = i
            n += 1
            b.row_ptr[n] = pairs
        if ways > 1:
            way = way + 1 if way + 1 < ways else 0
            here = to.host_of[way]
    if n == 0:
        return 0, False
    words = b.words
    words[EPOCH], words[STEP], words[LAYER] = numbers.epoch, numbers.step, numbers.layer
    words[ROWS], words[PAIRS] = n, pairs
    atomics.store(words, REQUEST, numbers.number)
    return n, atomics.load(words, ASLEEP) != 0


@compiled
def collect(words, partial, token, n, number, looks, out):
    """Wait for the reply to a request and add its rows to `out` [N, D].

    Args:
        words, partial: Parts of the box.
        token: [B] int64, the token of each row, as written by `post`.
        n: Number of rows sent.
        number: Number of the request.
        looks: Number of looks after which to give up.

    Returns:
        PENDING after `looks` looks or when the connection was closed, ANSWERED, or REFUSED (adds nothing).
    """
    while atomics.load(words, REPLY) != number:
        if looks == 0 or atomics.load(words, ENDED) != 0:
            return PENDING
        looks -= 1
        atomics.let_others_run()
    if words[STATUS] != ANSWERED:
        return REFUSED
    for i in range(n):
        for d in range(out.shape[1]):
            out[token[i], d] += partial[i, d]
    return ANSWERED


@compiled
def watch(words, answered, packets, looks):
    """Wait on the host for a request after the last answered one, or for a packet on the socket.

    Args:
        words: Head of the box.
        answered: Number of the last answered request.
        packets: Number of packets read from the socket.
        looks: Number of looks after which to give up.

    Returns:
        NOTHING after `looks` looks, MAIL or PACKET; and the number of the newest request.
    """
    while True:
        asked = atomics.load(words, REQUEST)
        if asked != answered:
            return MAIL, asked
        if atomics.load(words, RING) != packets:
            return PACKET, asked
        if looks == 0:
            return NOTHING, asked
        looks -= 1
        atomics.let_others_run()


@compiled
def accept(words, row_ptr, expert, local_of, own_ptr, own_expert):
    """Copy a request's pairs out of a box and check them; experts become indices into the host's shard.

    Args:
        words, row_ptr, expert: Parts of the box.
        local_of: [E] int32, -1 for experts of other hosts.
        own_ptr: [B + 1] int64, written.
        own_expert: [P] int64, written.

    Returns:
        Number of rows and of pairs; 0 and 0 for a malformed request.
    """
    n, pairs = words[ROWS], words[PAIRS]
    if not (0 < n < own_ptr.shape[0] and 0 < pairs <= own_expert.shape[0]):
        return 0, 0
    own_ptr[0] = 0
    for i in range(n):
        own_ptr[i + 1] = row_ptr[i + 1]
        if own_ptr[i + 1] < own_ptr[i]:
            return 0, 0
    if own_ptr[n] != pairs:
        return 0, 0
    for p in range(pairs):
        e = expert[p]
        if e < 0 or e >= local_of.shape[0] or local_of[e] < 0:
            return 0, 0
        own_expert[p] = local_of[e]
    return n, pairs


__all__ = [
    "ANSWERED",
    "ASLEEP",
    "ENDED",
    "EPOCH",
    "LAYER",
    "MAIL",
    "NOTHING",
    "PACKET",
    "PENDING",
    "REFUSED",
    "REPLY",
    "REQUEST",
    "RING",
    "STATUS",
    "STEP",
    "WORDS",
    "Box",
    "CallNumbers",
    "Recipient",
    "RoutedRows",
    "accept",
    "collect",
    "load",
    "post",
    "store",
    "watch",
]
