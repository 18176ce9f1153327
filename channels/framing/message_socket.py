"""Messages over a stream socket: the text of a header, and the small tensors of its payload."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from typing import Final, NamedTuple

from channels.framing.header import MAX_MESSAGE
from errors import ChannelError, ChannelTimeout, ProtocolError

INLINE: Final = 1 << 14
"""Most bytes of a payload that come with the header. All that may be in flight fits the sockets' buffers, so
that the two ends never wait for each other with both directions full."""
_BUFFER: Final = 1 << 19
_MAX_HEADER: Final = 1 << 16
_HEAD: Final = struct.Struct("!IIQQ")
"""Bytes of the header, of the small tensors and of the payload; number of payloads received by the sender."""
_CHUNK: Final = 1 << 16
_LOOK: Final = 1.0  # seconds between two checks of a deadline
_TIME: Final = struct.Struct("@ll")  # seconds and microseconds


class Head(NamedTuple):
    """The part of a message ahead of its payload.

    Attributes:
        text: The header's text.
        size: Bytes of the payload.
        inline: The payload's small tensors.
        received: Number of payloads that the sender has received so far, whose memory is free again.
    """

    text: bytes
    size: int = 0
    inline: bytes | bytearray = b""
    received: int = 0


class MessageSocket:
    """One end of a connection; one thread writes, one thread reads.

    Args:
        peer: The peer's address, for messages.
        inline: Most bytes of a payload that come with the header.
    """

    def __init__(self, connection: socket.socket, peer: str, *, inline: int = INLINE) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(None)
        self._socket = connection
        self._wait = 0.0  # seconds, the socket's own timeout; 0 for none
        self._peer, self._inline = peer, inline
        self._come = bytearray(_CHUNK)  # received and not read yet: from _at to _end
        self._at = self._end = 0

    def write(self, head: Head) -> None:
        """Send a message.

        Raises:
            ChannelError: The peer closed the connection.
        """
        text, size, inline, received = head
        try:
            self._socket.sendall(b"".join((_HEAD.pack(len(text), len(inline), size, received), text, inline)))
        except OSError as error:
            raise ChannelError(f"{self._peer} closed the connection ({error})") from None

    def read(self, deadline: float | None = None) -> Head:
        """The next message.

        Raises:
            ChannelTimeout: Nothing came until `deadline`, of `time.monotonic`.
            ChannelError: The peer closed the connection.
            ProtocolError: The message is malformed.
        """
        self._have(_HEAD.size, deadline)
        length, small, size, received = _HEAD.unpack_from(self._come, self._at)
        if length > _MAX_HEADER or small > self._inline or size > MAX_MESSAGE:
            raise ProtocolError(f"a message of {length} + {small} + {size} bytes is malformed")
        self._have(_HEAD.size + length + small, deadline)
        text = self._at + _HEAD.size
        inline = text + length
        end = self._at = inline + small
        return Head(bytes(self._come[text:inline]), size, self._come[inline:end], received)

    def _have(self, count: int, deadline: float | None) -> None:
        """Wait for `count` bytes after `_at`; reads all that have come from the socket at once."""
        lacking = count - (self._end - self._at)
        if lacking <= 0:
            return
        rest = self._come[self._at : self._end]
        if count > len(self._come):
            self._come = bytearray(count)
        self._come[: len(rest)] = rest
        self._at, self._end = 0, len(rest)
        view = memoryview(self._come)
        try:
            while self._end < count:
                self._limit(remaining(deadline))
                try:
                    got = self._socket.recv_into(view[self._end :])
                except BlockingIOError:  # the socket's own timeout, which may be shorter
                    continue
                if not got:
                    raise ChannelError(f"{self._peer} closed the connection; has its process ended?")
                self._end += got
        except TimeoutError:
            raise ChannelTimeout(f"{self._peer} does not answer") from None
        except OSError as error:
            raise ChannelError(f"{self._peer} closed the connection ({error})") from None

    def _limit(self, seconds: float | None) -> None:
        """Set the socket's timeout, if it has changed: that costs a system call."""
        wait = 0.0 if seconds is None else min(seconds, _LOOK)
        if wait != self._wait:
            self._wait = wait
            whole = int(wait)
            limit = _TIME.pack(whole, int((wait - whole) * 1e6) + (0 < wait < 1e-6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def shut(self) -> None:
        """End the waits on the socket at both ends. Any thread."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.shut()
        self._socket.close()


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline, never 0, which would mean not to wait at all; None for no deadline.

    Raises:
        TimeoutError: The deadline has passed.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


__all__ = ["INLINE", "Head", "MessageSocket", "remaining"]
