"""Sends copies of a host's state to its buddies, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from actors.host.state_copies import Copy
from actors.messages.transfer_orders import Peer
from cluster.topology import HostInfo


class Pusher:
    """One copy at a time; one that is no longer kept by the time its turn comes fails at once.

    Args:
        connect: reaches a buddy.
    """

    def __init__(self, connect: Callable[[HostInfo], Peer]) -> None:
        self._connect = connect
        self._turn = threading.Lock()

    def push(self, copy: Copy, buddies: Sequence[HostInfo]) -> None:
        """Begin; what becomes of it is written to `copy.pushes`."""
        copy.pushes = dict.fromkeys((buddy.id for buddy in buddies), None)
        if buddies:
            threading.Thread(
                target=self._push, args=(copy, tuple(buddies)), name=f"push-{copy.step}", daemon=True
            ).start()

    def _push(self, copy: Copy, buddies: Sequence[HostInfo]) -> None:
        with self._turn:
            for buddy in buddies:
                outcome = ""
                try:
                    copy.check()
                    peer = self._connect(buddy)
                    try:
                        peer.store(copy.frames())
                    finally:
                        peer.close()
                except Exception as error:  # nothing depends on it: whoever recovers looks what is there
                    outcome = f"{type(error).__name__}: {error}"
                copy.pushes = {**copy.pushes, buddy.id: outcome}


__all__ = ["Pusher"]
