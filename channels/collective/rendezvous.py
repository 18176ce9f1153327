"""The rendezvous of a process group of two, over the line between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import torch.distributed

from channels.framing.message_socket import Head, MessageSocket
from errors import ProtocolError

_dist: Any = torch.distributed  # whose stubs do not know the classes below its functions
_MAX_TOLD: Final = 64  # for a group of two takes a handful


class Rendezvous(_dist.Store):  # type: ignore[misc]
    """What the two ends of a line tell each other for a group to form: a store without a port of its own.

    Args:
        deadline: of `time.monotonic`, for the group to form.
    """

    def __init__(self, line: MessageSocket, deadline: float) -> None:
        super().__init__()
        self._line, self._deadline = line, deadline
        self._known: dict[str, bytes] = {}
        self._guard = threading.RLock()
        self._over = False

    def set(self, key: str, value: Any) -> None:
        """Tell both ends."""
        told = value.encode() if isinstance(value, str) else bytes(value)
        with self._guard:
            self._known[key] = told
            if not self._over:
                self._line.write(Head(key.encode(), len(told), told))

    def get(self, key: str) -> bytes:
        """Wait for what either end tells."""
        with self._guard:
            while key not in self._known:
                if self._over:
                    raise ProtocolError(f"nobody tells of {key} any more")
                told = self._line.read(self._deadline)
                if told.size != len(told.inline):
                    raise ProtocolError(f"{told.size} bytes for a group to form")
                if len(self._known) >= _MAX_TOLD:
                    raise ProtocolError(f"more than {_MAX_TOLD} things for a group to form")
                self._known[told.text.decode("utf-8", "replace")] = bytes(told.inline)
            return self._known[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Until all are told."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all have been told, as far as this end knows."""
        return all(key in self._known for key in keys)

    def end(self) -> None:
        """The group has formed: the line is for messages from now on."""
        with self._guard:
            self._over = True


__all__ = ["Rendezvous"]
