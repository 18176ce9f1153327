"""An estimate of the memory that a JSON body takes when it is parsed, without parsing it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONTAINER_BYTES, KEY_BYTES, ITEM_BYTES = 1000, 700, 60
"""What an object or array, an entry of an object, and one of an array take at most, as Python's values and
in the objects or errors of validation. Requests that can be answered have many entries of arrays alone."""
_PIECE = 1 << 20  # bytes that are looked at in one step, which bounds the memory of the look itself
_QUOTE, _COMMA, _COLON = b'",:'
_FEW_CONTAINERS, _FEW_VALUES = 16, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyCost:
    """What parsing a body costs.

    Attributes:
        memory: Bytes, the body included.
        values: Number of values outside strings, rounded up.
        depth: Objects and arrays within each other.
    """

    memory: int
    values: int
    depth: int


def body_cost(body: bytes) -> BodyCost:
    """The cost of parsing a JSON body; any bytes have one."""
    containers, keys, items = (sum(map(body.count, marks)) for marks in ((b"[", b"{"), (b":",), (b",",)))
    depth = containers
    if containers > _FEW_CONTAINERS or keys + items > _FEW_VALUES:  # in strings, they stand for nothing
        containers, keys, items, depth = _outside_strings(body)
    memory = len(body) * (1 + 2 * _bytes_of_a_character(body))
    memory += containers * CONTAINER_BYTES + keys * KEY_BYTES + items * ITEM_BYTES
    return BodyCost(memory=memory, values=containers + keys + items, depth=depth)


def _bytes_of_a_character(body: bytes) -> int:
    """Bytes that Python takes for a character of a text that has all of the body's characters."""
    if body.isascii() and b"\\u" not in body:
        return 1
    return 4


def _outside_strings(body: bytes) -> tuple[int, int, int, int]:
    """Numbers of containers, colons and commas, and the depth, of what stands outside strings."""
    if b"\\" in body:  # an escaped quote ends no string
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    data = np.frombuffer(body, np.uint8)
    inside = containers = keys = items = depth = deepest = 0
    for begin in range(0, len(data), _PIECE):
        piece = data[begin : begin + _PIECE]
        quotes = (piece == _QUOTE).astype(np.uint8)
        within = np.bitwise_xor.accumulate(quotes) ^ np.uint8(inside)
        inside = int(within[-1])
        piece = piece[within == 0]
        opening = (piece == ord("[")) | (piece == ord("{"))
        closing = (piece == ord("]")) | (piece == ord("}"))
        steps = opening.astype(np.int8) - closing.astype(np.int8)
        levels = np.cumsum(steps[steps != 0], dtype=np.int64)
        if len(levels):
            deepest = max(deepest, depth + int(levels.max()))
            depth += int(levels[-1])
        containers += int(np.count_nonzero(opening))
        keys += int(np.count_nonzero(piece == _COLON))
        items += int(np.count_nonzero(piece == _COMMA))
    return containers, keys, items, deepest


__all__ = ["BodyCost", "body_cost"]
