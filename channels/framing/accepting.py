"""A server of connections: a thread that accepts, and one for each connection."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from typing import Final, Generic, Protocol, TypeVar

from errors import ChannelError, ProtocolError

_log = logging.getLogger(__name__)

BACKLOG: Final = 128
_PAUSE: Final = 0.1  # seconds after an accept that failed


class Conversation(Protocol):
    """The host's end of one connection."""

    @property
    def caller(self) -> str:
        """The peer's name, for logs."""

    def shut(self) -> None:
        """End the waits on the connection at both ends. Any thread."""

    def close(self) -> None:
        """Free the connection's resources."""


C = TypeVar("C", bound=Conversation)


class AcceptingServer(Generic[C]):
    """Accepts connections until it is closed; subclasses implement the conversation on one.

    Args:
        listener: A listening socket.
        address: The address for `connect`.
    """

    def __init__(self, listener: socket.socket, address: str) -> None:
        self._listener = listener
        self._address = address
        self._kind = address.partition(":")[0]
        self._open: dict[socket.socket, tuple[threading.Thread, C | None]] = {}
        self._guard = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name=f"{self._kind}-accept", daemon=True)

    def start(self) -> None:
        """Start to accept connections."""
        self._accepting.start()

    @property
    def address(self) -> str:
        """The address for `connect`."""
        return self._address

    def close(self) -> None:
        """Close every connection and join every thread, once running handlers have returned."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            threads = [thread for thread, _ in self._open.values()]
        with suppress(OSError):  # it is shut already
            self._listener.shutdown(socket.SHUT_RDWR)
        self.disconnect_all()
        self._accepting.join()
        self._listener.close()
        for thread in threads:
            thread.join()

    def disconnect_all(self) -> None:
        """Close every connection that is open now; callers may connect again."""
        with self._guard:
            connections = [(connection, found) for connection, (_, found) in self._open.items()]
        for connection, found in connections:
            if found is not None:
                found.shut()
                continue
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)

    def _begin(self, connection: socket.socket) -> C:
        """Make the end of a connection, in the connection's own thread, which may wait for the peer.

        Raises:
            ChannelError, ProtocolError, OSError: The connection is refused.
        """
        raise NotImplementedError

    def _talk(self, found: C) -> None:
        """Answer requests until the caller closes the connection.

        Raises:
            ChannelError, OSError: The caller closed the connection.
            ProtocolError: A message is malformed.
        """
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("%s: cannot accept: %s", self._address, error)
                time.sleep(_PAUSE)  # the process may have no free descriptors for a while
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name=f"{self._kind}-serve", daemon=True
            )
            with self._guard:
                if self._closed:
                    connection.close()
                    return
                self._open[connection] = (thread, None)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        found: C | None = None
        try:
            found = self._begin(connection)
            with self._guard:
                self._open[connection] = (self._open[connection][0], found)
                closed = self._closed
            if not closed:
                self._talk(found)
        except ProtocolError as error:
            caller = "a caller" if found is None else found.caller
            # The text only: a log record that keeps the error would keep its traceback's frames and their
            # memory.
            _log.warning("%s: closed the connection to %s: %s", self._address, caller, str(error))
        except (ChannelError, OSError) as error:
            if found is None and not self._closed:
                _log.warning("%s: refused a connection: %s", self._address, str(error))
        finally:
            if found is not None:
                found.close()
            connection.close()
            with self._guard:
                del self._open[connection]


__all__ = ["BACKLOG", "AcceptingServer", "Conversation"]
