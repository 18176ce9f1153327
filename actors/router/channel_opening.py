"""A channel opened by a lane that does not wait for a host which is gone in the meantime."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from channels.base import Channel
from cluster.topology import HostInfo
from errors import ChannelError, RaymoeError

GONE: Final = "the host is in no routing table any more"
_LOOK: Final = 0.02  # seconds between two looks at whether it is gone


class _Opening:
    """A connection that is being made in a thread of its own."""

    def __init__(self, connect: Callable[[HostInfo], Channel], host: HostInfo) -> None:
        self._connect, self._host = connect, host
        self._lock = threading.Lock()
        self._given_up = False
        self._outcome: Channel | BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name=f"connect-{host.id}", daemon=True).start()

    def result(self) -> Channel:
        """What came of it, once it is done."""
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def give_up(self) -> None:
        """Nobody wants it any more: what is opened yet is closed."""
        with self._lock:
            self._given_up = True
            outcome = self._outcome
        _close(outcome)

    def _run(self) -> None:
        outcome: Channel | BaseException
        try:
            outcome = self._connect(self._host)
        except BaseException as error:
            outcome = error
        with self._lock:
            self._outcome = outcome
            given_up = self._given_up
        self.done.set()
        if given_up:
            _close(outcome)


def open_unless(gone: Callable[[], bool], connect: Callable[[HostInfo], Channel], host: HostInfo) -> Channel:
    """`connect(host)`, unless the host is gone before that has come to an end.

    Raises:
        ChannelError: it is; and what `connect` raises.
    """
    opening = _Opening(connect, host)
    while not opening.done.wait(_LOOK):
        if gone():
            opening.give_up()
            raise ChannelError(GONE)
    return opening.result()


def _close(outcome: Channel | BaseException | None) -> None:
    if outcome is not None and not isinstance(outcome, BaseException):
        with suppress(RaymoeError):
            outcome.close()


__all__ = ["GONE", "open_unless"]
