"""Packets of the shared memory channel: one on a Unix socket for each request and reply.

A packet is a fixed head, the numbers of the segments that its sender has released, and a protobuf `Header`; a
new segment's descriptor travels with it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from channels.framing.buffers import COPIED_BELOW, plain, tensor_at
from channels.framing.header import Layout, TensorSpan
from channels.shm.mailbox import HostMailbox, ShmMailbox, size_of
from channels.shm.segments import SegmentMirror, ShmSegment, new_segment, sealed_segment, shm_pool
from errors import ChannelError, ChannelTimeout, ProtocolError

_HEAD: Final = struct.Struct("<4sIQQI")  # magic, segment, capacity if it is new, size, segments released
_MAGIC: Final = b"rmo1"
_NO_SEGMENT: Final = 0xFFFFFFFF
_MAILBOX: Final = 0xFFFFFFFE
"""In place of a segment: the packet has the descriptor of a mailbox, see `channels.shm.mailbox`."""
_NOTE: Final = 0xFFFFFFFD
"""In place of a segment: the packet is a note, which belongs to the message after it."""
_MAX_PACKET: Final = 1 << 16
_MAX_RELEASED: Final = 64
_CUT: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)  # plain numbers: an enum's operators are slow
_CREDENTIALS: Final = struct.Struct("3i")
_INT: Final = array.array("i").itemsize
_ANCILLARY: Final = socket.CMSG_SPACE(4 * _INT)
_NONE: Final = array.array("i")
_WHEN_IT_COMES: Final = int(socket.MSG_CMSG_CLOEXEC)
_AT_ONCE: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_LONGEST: Final = 1e9  # seconds that a socket takes as a time-out
_SPIN: Final = 200e-6
"""Seconds that a receive polls before it sleeps, if the wait before was short. To sleep and wake up costs
about 50 µs at each end; in longer waits the peer computes, and needs the core."""


def _write(segment: ShmSegment, where: TensorSpan, tensor: torch.Tensor) -> None:
    size = where.end - where.offset
    if size < COPIED_BELOW:
        flat = plain(tensor)
        ctypes.memmove(segment.address + where.offset, flat.data_ptr(), size)
    else:  # one pass whatever the strides, by several threads, and without the interpreter's lock
        tensor_at(segment.memory, segment.address, where).copy_(tensor.detach())


class Packet(NamedTuple):
    """A received packet: a header's text, and the segment with the payload of `size` bytes; or a note."""

    text: bytes
    size: int
    segment: ShmSegment | None
    note: bool = False

    def tensors(self, spans: tuple[TensorSpan, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors of the payload, as views of the segment."""
        if self.segment is None:
            return tuple(torch.empty(where.shape, dtype=where.dtype) for where in spans)
        return self.segment.views(spans)


class Doorbell:
    """One end of a connection: its socket, and the segments of both directions; used by one thread at a time.

    Raises:
        ChannelError: The peer's process belongs to another user.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pool = shm_pool()
        self._mirror = SegmentMirror()
        self._read: deque[int] = deque()
        self._buffer = bytearray(_MAX_PACKET)
        self._patience = 0.0
        self._brief = False  # the wait before was short
        self._shut = False
        self._mailbox: ShmMailbox | None = None
        self.box: HostMailbox | None = None  # opened by the peer
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.peer, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.geteuid():
            raise ChannelError(
                f"the process at the other end (pid {self.peer}) runs as user {user}, this one as"
                f" {os.geteuid()}; shared memory is for one user, use grpc"
            )

    def send(self, text: bytes, payload: Layout, tensors: Sequence[torch.Tensor] = ()) -> int | None:
        """Write the tensors to a segment and send its packet; the segment's number, if one was needed.

        Raises:
            ProtocolError: The header is too long.
            ResourceError: The system gives no memory or descriptor.
            ChannelError: The peer is gone.
        """
        size = payload.size
        if len(text) > _MAX_PACKET - _HEAD.size - 4 * _MAX_RELEASED:
            raise ProtocolError(f"a header of {len(text)} bytes does not fit a packet; shorten its names")
        if not size:
            self._ring(text, None, 0, 0, None)
            return None
        number, segment, descriptor = self._pool.take(size)
        try:
            try:
                for tensor, where in zip(tensors, payload.spans, strict=True):
                    _write(segment, where, tensor)
            except BaseException:
                # The peer has not been told: a new segment is dropped, an old one is free again.
                if descriptor is None:
                    self._pool.release(number)
                else:
                    self._pool.forget(number)
                raise
            self._ring(text, segment, segment.capacity if descriptor is not None else 0, size, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return number

    def _ring(
        self, text: bytes, segment: ShmSegment | None, capacity: int, size: int, descriptor: int | None
    ) -> None:
        waiting = self._read
        read = [waiting.popleft() for _ in range(min(len(waiting), _MAX_RELEASED))]
        index = _NO_SEGMENT if segment is None else segment.index
        packet = _HEAD.pack(_MAGIC, index, capacity, size, len(read))
        if read:
            packet += struct.pack(f"<{len(read)}I", *read)
        packet += text
        self._send(packet, descriptor)

    def _send(self, packet: bytes, descriptor: int | None) -> None:
        if self._mailbox is not None:
            self._mailbox.count_packet()
        try:
            if descriptor is None:
                self._socket.send(packet, socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._socket, [packet], [descriptor], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ChannelError(f"pid {self.peer} closed the connection: {error}") from error

    def wake_peer(self) -> None:
        """Wake the peer with an empty packet.

        Raises:
            ChannelError: The peer is gone.
        """
        self._ring(b"", None, 0, 0, None)

    def note(self, text: bytes) -> None:
        """Send a note, which belongs to the next message.

        Raises:
            ProtocolError: It is too long.
            ChannelError: The peer is gone.
        """
        if len(text) > _MAX_PACKET - _HEAD.size:
            raise ProtocolError(f"a note of {len(text)} bytes does not fit a packet")
        self._send(_HEAD.pack(_MAGIC, _NOTE, 0, 0, 0) + text, None)

    def check_peer(self) -> None:
        """Check that the peer has not closed the connection.

        Raises:
            ChannelError: It has, or this end was shut.
        """
        if self._shut:  # packets from before that can still be read
            raise ChannelError(f"the connection to pid {self.peer} was shut")
        try:
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelError(f"pid {self.peer} closed the connection: {error}") from error
        raise ChannelError(f"pid {self.peer} closed the connection")

    def open_mailbox(self, width: int, pairs: int, dtype: np.dtype[Any]) -> ShmMailbox:
        """Open a mailbox and send its memory to the peer; its `ready` says when the peer reads it.

        Raises:
            ResourceError: The system gives no memory or descriptor.
            ChannelError: The peer is gone.
        """
        memory, descriptor = new_segment(_MAILBOX, size_of(width, pairs, dtype))
        try:
            mailbox = ShmMailbox(
                memory.memory, width, pairs, dtype, wake=self.wake_peer, alive=self.check_peer
            )
            self._send(_HEAD.pack(_MAGIC, _MAILBOX, memory.capacity, 0, 0), descriptor)
        finally:
            os.close(descriptor)
        self._mailbox = mailbox  # the peer counts packets from the next one on
        return mailbox

    def receive(self, deadline: float | None = None) -> Packet:
        """Wait for a packet.

        Raises:
            ChannelTimeout: The deadline (of `time.monotonic`) passed.
            ChannelError: The peer is gone.
            ProtocolError: The packet is malformed.
        """
        self._set_patience(deadline)
        try:
            length, ancillary, flags, _ = self._wait()
        except BlockingIOError:
            raise ChannelTimeout(f"pid {self.peer} does not answer") from None
        except OSError as error:
            raise ChannelError(f"pid {self.peer} closed the connection: {error}") from error
        descriptors = array.array("i") if ancillary else _NONE
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % _INT])
        try:
            if not length:
                raise ChannelError(f"pid {self.peer} closed the connection")
            if flags & _CUT:
                raise ProtocolError("a packet is longer than any may be")
            return self._read_packet(memoryview(self._buffer)[:length], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _wait(self) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receive the next packet into the buffer; polls first, if the wait before was short."""
        began = time.perf_counter()
        receive, into = self._socket.recvmsg_into, [self._buffer]
        if self._brief:
            while time.perf_counter() - began < _SPIN:
                try:
                    return receive(into, _ANCILLARY, _AT_ONCE)
                except BlockingIOError:
                    os.sched_yield()
        came = receive(into, _ANCILLARY, _WHEN_IT_COMES)
        self._brief = time.perf_counter() - began < 2.5 * _SPIN
        return came

    def _read_packet(self, packet: memoryview, descriptors: array.array[int]) -> Packet:
        if len(packet) < _HEAD.size:
            raise ProtocolError(f"a packet of {len(packet)} bytes is shorter than its head")
        magic, index, capacity, size, n_released = _HEAD.unpack_from(packet)
        text = _HEAD.size + 4 * n_released
        if magic != _MAGIC or text > len(packet):
            raise ProtocolError(
                f"a packet of {len(packet)} bytes has another beginning than a packet of raymoe"
            )
        if len(descriptors) != (1 if capacity else 0):
            raise ProtocolError(
                f"a packet has {len(descriptors)} descriptors, another number than it announces"
            )
        if n_released:
            for released in struct.unpack_from(f"<{n_released}I", packet, _HEAD.size):
                self._pool.release(released)
        if index == _MAILBOX:
            self.box = (
                HostMailbox(sealed_segment(index, descriptors[0], capacity).memory) if capacity else None
            )
            return Packet(b"", 0, None)
        if self.box is not None:
            self.box.count_received()
        if index == _NOTE and not capacity:
            return Packet(bytes(packet[text:]), 0, None, note=True)
        if capacity:
            self._mirror.attach(index, descriptors[0], capacity)
        segment = self._mirror.get(index, size) if size else None
        return Packet(bytes(packet[text:]), size, segment)

    def done_with(self, segment: ShmSegment | None) -> None:
        """Release a segment of the peer, which learns of it with the next packet. Any thread."""
        if segment is not None:
            self._read.append(segment.index)

    def reusable(self, index: int | None) -> None:
        """Reuse the segment of a message that the peer has answered."""
        if index is not None:
            self._pool.release(index)

    def _set_patience(self, deadline: float | None) -> None:
        # The kernel's own timeout: a poll before each receive would be one more system call.
        # A twentieth more is as good: calls with the same timeout then leave it as it is.
        patience = 0.0 if deadline is None else min(max(deadline - time.monotonic(), 1e-6), _LONGEST)
        if not patience <= self._patience <= 1.05 * patience:
            patience *= 1.04
            seconds = int(patience)
            value = struct.pack("ll", seconds, max(int((patience - seconds) * 1e6), 0 if seconds else 1))
            with contextlib.suppress(OSError):  # closed by another thread: the receive will tell
                self._socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVTIMEO, value if patience else struct.pack("ll", 0, 0)
                )
            self._patience = patience

    @property
    def caller(self) -> str:
        """The peer's name, for logs."""
        return f"pid {self.peer}"

    def shut(self) -> None:
        """End the waits at both ends with an error. Any thread."""
        self._shut = True
        mailbox = self._mailbox
        if mailbox is not None:
            mailbox.end()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and unmap all memory except what tensors are views of."""
        self.shut()
        self._socket.close()
        self._pool.clear()
        self._mirror.clear()


__all__ = ["Doorbell", "Packet"]
