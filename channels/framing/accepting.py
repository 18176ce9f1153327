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
    """The host's end of a connection."""

    @property
    def caller(self) -> str:
        """Who is at the other end, for logs."""

    def shut(self) -> None:
        """Whoever waits on it, here or there, waits no longer. Any thread."""

    def close(self) -> None:
        """Give everything back."""


C = TypeVar("C", bound=Conversation)


class AcceptingServer(Generic[C]):
    """Accepts connections until it is closed; a subclass says how to talk on one.

    Args:
        listener: a listening socket.
        address: what `connect` takes.
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
        """Accept from now on."""
        self._accepting.start()

    @property
    def address(self) -> str:
        """What `connect` takes."""
        return self._address

    def close(self) -> None:
        """Hang up on every caller and join every thread; a handler at work is waited for."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            threads = [thread for thread, _ in self._open.values()]
        with suppress(OSError):  # there is nobody to wake
            self._listener.shutdown(socket.SHUT_RDWR)
        self.disconnect_all()
        self._accepting.join()
        self._listener.close()
        for thread in threads:
            thread.join()

    def disconnect_all(self) -> None:
        """End every connection that is open now; callers may come again."""
        with self._guard:
            connections = [(connection, found) for connection, (_, found) in self._open.items()]
        for connection, found in connections:
            if found is not None:
                found.shut()
                continue
            with suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)

    def _begin(self, connection: socket.socket) -> C:
        """Make a connection's end; in its own thread, so the peer may be waited for.

        Raises:
            ChannelError, ProtocolError, OSError: it is of no use.
        """
        raise NotImplementedError

    def _talk(self, found: C) -> None:
        """Answer requests until the caller hangs up.

        Raises:
            ChannelError, OSError: the caller hung up.
            ProtocolError: what came is none of ours.
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
                time.sleep(_PAUSE)  # of descriptors there may be none for a while
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
            # Its text: a log that keeps the error would keep the frames it came through, and their memory.
            _log.warning("%s: hung up on %s: %s", self._address, caller, str(error))
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
