"""The rendezvous of a process group of two, over the connection between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import torch.distributed

from channels.framing.message_socket import Head, MessageSocket
from errors import ProtocolError

_dist: Any = torch.distributed  # whose stubs do not know the classes below its functions
_MAX_KEYS: Final = 64  # a group of two sets a handful


class Rendezvous(_dist.Store):  # type: ignore[misc]
    """A key-value store for a process group to form, over a connection instead of a port of its own.

    Args:
        deadline: Of `time.monotonic`, for the group to form.
    """

    def __init__(self, connection: MessageSocket, deadline: float) -> None:
        super().__init__()
        self._socket, self._deadline = connection, deadline
        self._known: dict[str, bytes] = {}
        self._guard = threading.RLock()
        self._over = False

    def set(self, key: str, value: Any) -> None:
        """Set a key at both ends."""
        told = value.encode() if isinstance(value, str) else bytes(value)
        with self._guard:
            self._known[key] = told
            if not self._over:
                self._socket.write(Head(key.encode(), len(told), told))

    def get(self, key: str) -> bytes:
        """Wait for the value of a key, set by either end."""
        with self._guard:
            while key not in self._known:
                if self._over:
                    raise ProtocolError(f"the group formed without the key {key}")
                told = self._socket.read(self._deadline)
                if told.size != len(told.inline):
                    raise ProtocolError(f"{told.size} bytes for a key of a rendezvous")
                if len(self._known) >= _MAX_KEYS:
                    raise ProtocolError(f"more than {_MAX_KEYS} keys for a group to form")
                self._known[told.text.decode("utf-8", "replace")] = bytes(told.inline)
            return self._known[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Wait for all keys."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether this end has the values of all keys."""
        return all(key in self._known for key in keys)

    def end(self) -> None:
        """Stop: the group has formed, and the connection carries messages from now on."""
        with self._guard:
            self._over = True


__all__ = ["Rendezvous"]
