"""A stream socket of messages: a header's text, and the part of the payload that is small."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from typing import Final, NamedTuple

from channels.framing.header import MAX_MESSAGE
from errors import ChannelError, ChannelTimeout, ProtocolError

INLINE: Final = 1 << 14
"""Bytes of a payload that come with the header at most. All that may be in flight fits the sockets' buffers,
so that the two ends never wait for one another with both directions full."""
_BUFFER: Final = 1 << 19
_MAX_HEADER: Final = 1 << 16
_HEAD: Final = struct.Struct("!IIQQ")
"""Bytes of the header, of the small tensors, of the whole payload; payloads that have come the other way."""
_CHUNK: Final = 1 << 16
_LOOK: Final = 1.0  # seconds between two looks at a deadline
_TIME: Final = struct.Struct("@ll")  # seconds and microseconds


class Head(NamedTuple):
    """What comes ahead of a payload.

    Attributes:
        text: of the header.
        size: of the payload.
        inline: what is small of the payload.
        received: payloads that the sender has had from the other end so far, whose memory is free again.
    """

    text: bytes
    size: int = 0
    inline: bytes | bytearray = b""
    received: int = 0


class MessageSocket:
    """One end; one thread writes, one thread reads.

    Args:
        peer: who is at the other end, for messages.
        inline: bytes of a payload that may come with a header.
    """

    def __init__(self, connection: socket.socket, peer: str, *, inline: int = INLINE) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(None)
        self._socket = connection
        self._wait = 0.0  # seconds, the socket's own limit; 0 for none
        self._peer, self._inline = peer, inline
        self._come = bytearray(_CHUNK)  # what has come and has not been read: from _at to _end
        self._at = self._end = 0

    def write(self, head: Head) -> None:
        """Send a message.

        Raises:
            ChannelError: the peer hung up.
        """
        text, size, inline, received = head
        try:
            self._socket.sendall(b"".join((_HEAD.pack(len(text), len(inline), size, received), text, inline)))
        except OSError as error:
            raise ChannelError(f"{self._peer} hung up ({error})") from None

    def read(self, deadline: float | None = None) -> Head:
        """The next message.

        Raises:
            ChannelTimeout: nothing came until `deadline`, of `time.monotonic`.
            ChannelError: the peer hung up.
            ProtocolError: what came is no message.
        """
        self._have(_HEAD.size, deadline)
        length, small, size, received = _HEAD.unpack_from(self._come, self._at)
        if length > _MAX_HEADER or small > self._inline or size > MAX_MESSAGE:
            raise ProtocolError(f"a message of {length} + {small} + {size} bytes, which is none of ours")
        self._have(_HEAD.size + length + small, deadline)
        text = self._at + _HEAD.size
        inline = text + length
        end = self._at = inline + small
        return Head(bytes(self._come[text:inline]), size, self._come[inline:end], received)

    def _have(self, count: int, deadline: float | None) -> None:
        """Wait for so many bytes after `_at`; as many as have come are taken from the socket at once."""
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
                except BlockingIOError:  # the socket's own limit, which is shorter than ours may be
                    continue
                if not got:
                    raise ChannelError(f"{self._peer} hung up; has its process ended?")
                self._end += got
        except TimeoutError:
            raise ChannelTimeout(f"{self._peer} does not answer") from None
        except OSError as error:
            raise ChannelError(f"{self._peer} hung up ({error})") from None

    def _limit(self, seconds: float | None) -> None:
        """How long the system lets a read wait. Set where it changes, as it costs a call of the system."""
        wait = 0.0 if seconds is None else min(seconds, _LOOK)
        if wait != self._wait:
            self._wait = wait
            whole = int(wait)
            limit = _TIME.pack(whole, int((wait - whole) * 1e6) + (0 < wait < 1e-6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def shut(self) -> None:
        """Whoever waits on the socket, here or there, finds it ended. Any thread."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back."""
        self.shut()
        self._socket.close()


def remaining(deadline: float | None) -> float | None:
    """Seconds until then, never 0, which would mean not to wait at all.

    Raises:
        TimeoutError: it has passed.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


__all__ = ["INLINE", "Head", "MessageSocket", "remaining"]
