"""Memory that one end of a connection writes and the other reads, in segments that are used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from errors import ProtocolError

S = TypeVar("S")
H = TypeVar("H")


class Pool(Generic[S, H]):
    """The segments that this end writes.

    Args:
        make: (number, bytes) -> a new segment, and what the peer opens it with.
        capacity: bytes of a segment.
        most: segments that there may be.
    """

    def __init__(
        self, make: Callable[[int, int], tuple[S, H]], capacity: Callable[[S], int], most: int
    ) -> None:
        self._make, self._capacity, self._most = make, capacity, most
        self._segments: dict[int, S] = {}
        self._free: set[int] = set()

    def take(self, size: int) -> tuple[int, S, H | None]:
        """A free segment of at least `size` bytes, with its number, and its handle if it is new.

        Raises:
            ResourceError: there is no memory for it.
            ProtocolError: the peer holds on to every segment there may be.
        """
        fitting = [number for number in self._free if self._capacity(self._segments[number]) >= size]
        if fitting:
            number = fitting[0] if len(fitting) == 1 else min(fitting, key=self._size)
            self._free.remove(number)
            return number, self._segments[number], None
        # A free one that is too small makes way, so that a pool follows its largest payloads.
        number = next(iter(self._free)) if self._free else self._unused()
        # Room for a quarter more: rows differ from call to call, and a new segment costs.
        segment, handle = self._make(number, size + size // 4)
        self._free.discard(number)
        self._segments[number] = segment
        return number, segment, handle

    def forget(self, number: int) -> None:
        """Drop a segment that the peer has never heard of."""
        self._segments.pop(number, None)
        self._free.discard(number)

    def release(self, number: int) -> None:
        """The peer is done with a segment.

        Raises:
            ProtocolError: it was not in use.
        """
        if number not in self._segments or number in self._free:
            raise ProtocolError(f"the peer gave back segment {number}, which it did not have")
        self._free.add(number)

    def clear(self) -> None:
        """Drop what nobody reads."""
        self._free.clear()
        self._segments.clear()

    def _unused(self) -> int:
        """A number for a new segment; those of forgotten ones are free."""
        for number in range(self._most):
            if number not in self._segments:
                return number
        raise ProtocolError(f"the peer holds on to {self._most} segments of memory; release results")

    def _size(self, number: int) -> int:
        return self._capacity(self._segments[number])


__all__ = ["Pool"]
