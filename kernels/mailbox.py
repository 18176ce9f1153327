"""A request and its reply in memory that two processes share, without a call of the system.

The client fills a box and raises its request's number, the host answers and raises its reply's; each waits
by looking, and lets others run between two looks, since more processes may look than there are cores.
What the other end writes is read once and checked against the box's own room.

Shapes: n rows of D numbers, nnz (row, expert) pairs; a box has room for B rows and P pairs; R ways to
choose one replica of every expert.
"""

from __future__ import annotations

from typing import Final

from numba import njit

from kernels.atomics import let_others_run as _let_others_run
from kernels.atomics import load as _load
from kernels.atomics import store as _store

# Words of a box's head, each in a cache line of its own where both ends write.
REQUEST: Final = 0
REPLY: Final = 8
ASLEEP: Final = 16  # the host waits on its socket and wants to be woken
RING: Final = 24  # packets that the client has sent on the socket
STATUS: Final = 32
EPOCH, STEP, LAYER, ROWS, PAIRS = (40, 41, 42, 43, 44)
ENDED: Final = 52  # the client's connection was shut: none of its threads waits on
WORDS: Final = 64

NOTHING, MAIL, PACKET = (0, 1, 2)
PENDING, ANSWERED, REFUSED = (0, 1, 2)

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def load(words, index):
    """A word that the other end may write."""
    return _load(words, index)


@_compiled
def store(words, index, value):
    """Write a word that the other end may read; all that was written before is there when it sees it."""
    _store(words, index, value)


@_compiled
def post(
    words, row_ptr, expert, gate, rows, token, x, idx, gates, host_of, host, shift, epoch, step, layer, number
):  # fmt: skip
    """Fill a box with what tokens want of one host, and send it.

    Args:
        words, row_ptr [B + 1], expert [P], gate [P], rows [B, D]: the box.
        token: [B] int64, the sender's note of which token each row is.
        x, idx, gates: [N, D], [N, K] and [N, K]; N fits the box.
        host_of: [R, E] int64; token n goes by row (n + shift) % R.
        number: of the request.

    Returns:
        Rows sent, none if no token wants the host, and whether it sleeps.
    """
    n = pairs = 0
    row_ptr[0] = 0
    ways = host_of.shape[0]
    way = shift % ways
    here = host_of[way]
    for i in range(x.shape[0]):
        before = pairs
        for k in range(idx.shape[1]):
            if here[idx[i, k]] == host:
                expert[pairs], gate[pairs] = idx[i, k], gates[i, k]
                pairs += 1
        if pairs > before:
            for d in range(x.shape[1]):
                rows[n, d] = x[i, d]
            token[n] = i
            n += 1
            row_ptr[n] = pairs
        if ways > 1:
            way = way + 1 if way + 1 < ways else 0
            here = host_of[way]
    if n == 0:
        return 0, False
    words[EPOCH], words[STEP], words[LAYER], words[ROWS], words[PAIRS] = epoch, step, layer, n, pairs
    _store(words, REQUEST, number)
    return n, _load(words, ASLEEP) != 0


@_compiled
def collect(words, partial, token, n, number, looks, out):
    """Wait for the reply to a request and add its rows to `out` [N, D].

    Returns:
        PENDING after so many looks or when the wait was ended, ANSWERED, or REFUSED (nothing is added).
    """
    while _load(words, REPLY) != number:
        if looks == 0 or _load(words, ENDED) != 0:
            return PENDING
        looks -= 1
        _let_others_run()
    if words[STATUS] != ANSWERED:
        return REFUSED
    for i in range(n):
        for d in range(out.shape[1]):
            out[token[i], d] += partial[i, d]
    return ANSWERED


@_compiled
def watch(words, answered, packets, looks):
    """Wait as a host for a request beyond the last one answered, or for word of a packet on the socket.

    Returns:
        NOTHING after so many looks, MAIL or PACKET, and the number of the newest request.
    """
    while True:
        asked = _load(words, REQUEST)
        if asked != answered:
            return MAIL, asked
        if _load(words, RING) != packets:
            return PACKET, asked
        if looks == 0:
            return NOTHING, asked
        looks -= 1
        _let_others_run()


@_compiled
def accept(words, row_ptr, expert, local_of, own_ptr, own_expert):
    """Take a request's pairs out of a box, checked, with experts as indices into the host's shard.

    Args:
        local_of: [E] int32, -1 for experts of other hosts.
        own_ptr: [B + 1] int64, written.
        own_expert: [P] int64, written.

    Returns:
        Rows and pairs; none where the request cannot be.
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
    "accept",
    "collect",
    "load",
    "post",
    "store",
    "watch",
]
