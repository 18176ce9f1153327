"""The memory of one process that request bodies, or their parsing, may take at a time."""

from __future__ import annotations

import asyncio
from collections import deque


class BodyMemory:
    """A budget of bytes, given out in the order in which it was asked for; used in one event loop.

    Args:
        size: Bytes that may be taken at a time.
        patience: Seconds that a request waits for its part.

    Attributes:
        size: Bytes that may be taken at a time.
    """

    def __init__(self, size: int, *, patience: float = 5.0) -> None:
        self.size = size
        self._patience = patience
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """Bytes that are not taken."""
        return self.size - self._taken

    async def take(self, count: int) -> None:
        """Take bytes, as soon as all earlier requests have theirs.

        Raises:
            TimeoutError: They were not free in time.
        """
        if self.take_free(count):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, turn)
        self._waiting.append(entry)
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._patience)
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give_back(count)  # it came together with the end of the wait
            else:
                self._waiting.remove(entry)
                self._serve()
            raise

    def take_free(self, count: int) -> bool:
        """Take bytes if they are free and no earlier request waits; whether they have been taken."""
        if self._waiting or count > self.free:
            return False
        self._taken += count
        return True

    def give_back(self, count: int) -> None:
        """Give bytes back."""
        self._taken -= count
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            count, turn = self._waiting.popleft()
            self._taken += count
            turn.set_result(None)


__all__ = ["BodyMemory"]
