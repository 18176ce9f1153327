"""The channel of torch.distributed: counts over a socket, then rows between the two ranks of a process group.

Each channel has a group of its own, of caller (rank 0) and host (rank 1), which lives as long as the
connection: a new placement, a host more or one less touches no other pair's. The connection carries the
group's rendezvous, then a header ahead of each payload, so the receiver knows what it will be sent before
it asks for it, waits without a time limit while nothing comes, and hears at once of a peer that died.
Small tensors come with the header, large ones by the group. The backend is gloo, which moves rows between
CPUs over TCP.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed

from channels import header as headers
from channels import tls
from channels.base import Channel, Handler, Request
from channels.codec import address_of, plain, tensor_at
from channels.header import Layout, Placement
from channels.pipe import Pipe, Reply, call
from errors import ChannelError, ChannelTimeout, ProtocolError, ResourceError

_log = logging.getLogger(__name__)
_dist: Any = torch.distributed  # whose stubs do not know the classes below its functions

_INLINE: Final = 1 << 14
"""Bytes of a payload that come with the header at most. All that may be in flight fits the sockets' buffers,
so that the two ends never wait for one another with both directions full."""
_MAX_SPARE: Final = 4
_BUFFER: Final = 1 << 19
_MAX_HEADER: Final = 1 << 16
_HEAD: Final = struct.Struct("!IIQ")  # bytes of the header, of the small tensors, of the whole payload
_CALLER, _HOST = 0, 1
_FORMING: Final = 30.0
"""Seconds that a host gives a caller for the group to form."""
_PATIENCE: Final = timedelta(days=1)  # of the group; waits have limits of their own


class Line:
    """A socket of messages: a header's text, the size of the payload, and the part of it that is small."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection
        self._peer = peer

    def write(self, text: bytes, size: int, inline: bytes = b"") -> None:
        """Send a message.

        Raises:
            ChannelError: the peer hung up.
        """
        try:
            self._socket.settimeout(None)
            self._socket.sendall(_HEAD.pack(len(text), len(inline), size) + text + inline)
        except OSError as error:
            raise ChannelError(f"{self._peer} hung up ({error})") from None

    def read(self, deadline: float | None = None) -> tuple[bytes, int, bytes]:
        """A header's text, its payload's size, and what is small of the payload.

        Raises:
            ChannelTimeout: nothing came until `deadline`, of `time.monotonic`.
            ChannelError: the peer hung up.
            ProtocolError: what came is no message.
        """
        length, small, size = _HEAD.unpack(self._exactly(_HEAD.size, deadline))
        if length > _MAX_HEADER or small > _INLINE or size > headers.MAX_MESSAGE:
            raise ProtocolError(f"a message of {length} + {small} + {size} bytes, which is none of ours")
        text = self._exactly(length, deadline)
        return text, size, self._exactly(small, deadline)

    def _exactly(self, count: int, deadline: float | None) -> bytes:
        found = bytearray(count)
        view, at = memoryview(found), 0
        try:
            while at < count:
                self._socket.settimeout(remaining(deadline))
                got = self._socket.recv_into(view[at:])
                if not got:
                    raise ChannelError(f"{self._peer} hung up; has its process ended?")
                at += got
        except TimeoutError:
            raise ChannelTimeout(f"{self._peer} does not answer") from None
        except OSError as error:
            raise ChannelError(f"{self._peer} hung up ({error})") from None
        return bytes(found)

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


class _Meeting(_dist.Store):  # type: ignore[misc]
    """What the two ends of a line tell each other for a group to form: a store without a port of its own."""

    def __init__(self, line: Line, deadline: float) -> None:
        super().__init__()
        self._line, self._deadline = line, deadline
        self._known: dict[str, bytes] = {}
        self._guard = threading.RLock()

    def set(self, key: str, value: Any) -> None:
        """Tell both ends."""
        told = value.encode() if isinstance(value, str) else bytes(value)
        with self._guard:
            self._known[key] = told
            name = key.encode()
            self._line.write(name, len(told), told)

    def get(self, key: str) -> bytes:
        """Wait for what either end tells."""
        with self._guard:
            while key not in self._known:
                name, size, value = self._line.read(self._deadline)
                if size != len(value):
                    raise ProtocolError(f"{size} bytes for a group to form")
                self._known[name.decode("utf-8", "replace")] = value
            return self._known[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Until all are told."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all have been told, as far as this end knows."""
        return all(key in self._known for key in keys)


class Rows:
    """A process group of two, and the payloads that are on their way to the other."""

    def __init__(self, line: Line, rank: int, peer: str, interface: str, timeout: float) -> None:
        self._peer, self._name = 1 - rank, peer
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(hostname=interface)]
        options._timeout = _PATIENCE
        meeting = _Meeting(line, time.monotonic() + timeout)
        try:
            self._group = _dist.ProcessGroupGloo(meeting, rank, 2, options)
        except RuntimeError as error:
            raise ChannelError(f"no process group with {peer}: {_first_line(error)}") from None
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()
        self._spare: list[torch.Tensor] = []  # memory of what has left
        self._waiting: Any = None
        self._ended = False

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to send; the tensors are the caller's again at once.

        Raises:
            ChannelError: the peer hung up.
        """
        try:
            while self._leaving and self._leaving[0][0].is_completed():
                memory = self._leaving.popleft()[1]
                if len(self._spare) < _MAX_SPARE:
                    self._spare.append(memory)
            for tensor in tensors:
                memory = self._memory(tensor.nbytes)
                leaving = memory[: tensor.nbytes].copy_(_bytes(tensor))
                self._leaving.append((self._group.send([leaving], self._peer, 0), memory))
        except RuntimeError as error:
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error

    def _memory(self, size: int) -> torch.Tensor:
        """Of at least this size; memory that is new costs more to touch than a copy into it."""
        for at, memory in enumerate(self._spare):
            if memory.nbytes >= size:
                return self._spare.pop(at)
        if len(self._spare) == _MAX_SPARE:
            del self._spare[0]
        return torch.empty(size, dtype=torch.uint8)

    def receive(self, tensors: Sequence[torch.Tensor], deadline: float | None) -> None:
        """Fill tensors with what the peer sends.

        Raises:
            ChannelTimeout: not until `deadline`.
            ChannelError: the peer hung up.
        """
        for tensor in tensors:
            self._fill(_bytes(tensor), deadline)

    def _fill(self, flat: torch.Tensor, deadline: float | None) -> None:
        try:
            limit = _PATIENCE if deadline is None else timedelta(seconds=remaining(deadline) or 0)
            self._waiting = work = self._group.recv([flat], self._peer, 0)
            if self._ended:
                work.abort()
            work.wait(limit)
        except TimeoutError:
            raise ChannelTimeout(f"{self._name} does not answer") from None
        except RuntimeError as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise ChannelTimeout(f"{self._name} does not answer") from None
            raise ChannelError(f"{self._name} hung up; has its process ended?") from error
        finally:
            self._waiting = None

    def end(self) -> None:
        """Whoever waits for rows waits no longer. Any thread."""
        self._ended = True
        work = self._waiting
        if work is not None:
            work.abort()


def _small(placed: Sequence[Placement]) -> list[bool]:
    """Which tensors come with the header: in their order, as long as they find room."""
    left, found = _INLINE, []
    for where in placed:
        size = where.end - where.offset
        found.append(size <= left)
        left -= size if found[-1] else 0
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory, which need not be of a type that gloo knows."""
    return plain(tensor).reshape(-1).view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class End:
    """One end of a connection: messages with their payloads."""

    def __init__(
        self, connection: socket.socket, rank: int, *, peer: str, interface: str, timeout: float
    ) -> None:
        self._line = Line(connection, peer)
        self._rows = Rows(self._line, rank, peer, interface, timeout)

    def send(self, text: bytes, payload: Layout, tensors: Sequence[torch.Tensor]) -> None:
        """A message; its tensors are the caller's again at once."""
        headers.require_fit(payload.size)
        small = _small(payload.placed)
        inline = bytearray()
        for tensor, where, is_small in zip(tensors, payload.placed, small, strict=True):
            if is_small and where.elements:
                inline += _bytes(tensor).numpy().data
        self._line.write(text, payload.size, bytes(inline))
        self._rows.send([tensor for tensor, is_small in zip(tensors, small, strict=True) if not is_small])

    def head(self, deadline: float | None = None) -> tuple[bytes, int, bytes]:
        """See `Line.read`."""
        return self._line.read(deadline)

    def payload(self, placed: Sequence[Placement], inline: bytes, deadline: float | None) -> Reply:
        """The tensors of the message whose head was read, in memory of their own."""
        memory = np.frombuffer(bytearray(inline), np.uint8) if inline else np.empty(0, np.uint8)
        address, at = address_of(memory), 0
        found, large = [], []
        for where, is_small in zip(placed, _small(placed), strict=True):
            if is_small:
                size = where.end - where.offset
                if at + size > len(inline):
                    raise ProtocolError(f"{len(inline)} bytes came with a header that has more small tensors")
                found.append(tensor_at(memory, address, where._replace(offset=at, end=at + size)))
                at += size
            else:
                found.append(torch.empty(where.shape, dtype=where.dtype))
                large.append(found[-1])
        self._rows.receive(large, deadline)
        return tuple(found)

    def shut(self) -> None:
        """Whoever waits on this end, or the other, waits no longer. Any thread."""
        self._line.shut()
        self._rows.end()

    def close(self) -> None:
        """Give everything back."""
        self.shut()
        self._line.close()


class CollectiveChannel(Pipe):
    """The router's end."""

    def __init__(self, name: str, end: End) -> None:
        super().__init__(name)
        self._end = end

    def _send(self, request: Request) -> None:
        payload = headers.layout(request.tensors)
        self._end.send(headers.request_text(request.id, payload), payload, request.tensors)

    def _receive(self, deadline: float | None) -> Reply:
        text, size, inline = self._end.head(deadline)
        return self._end.payload(headers.read_reply(text, size), inline, deadline)

    def _hang_up(self) -> None:
        self._end.close()

    def _wake(self) -> None:
        self._end.shut()


class CollectiveServer:
    """The host's end: a thread that accepts, and one for each connection.

    Raises:
        ResourceError: TLS is asked for, which rows between ranks have not.
        ChannelError: the interface cannot be listened on.
    """

    def __init__(self, handler: Handler, *, bind: str = "127.0.0.1:0") -> None:
        if tls.directory() is not None:
            raise ResourceError(
                f"{tls.VARIABLE} is set, and the collective channel is not encrypted; use grpc"
            )
        self._handler = handler
        self._host, _, port = bind.rpartition(":")
        try:
            self._listener = socket.create_server((self._host, int(port)), backlog=128)
        except OSError as error:
            raise ChannelError(f"collective cannot listen at {bind}: {error}") from error
        self._address = f"collective:{self._host}:{self._listener.getsockname()[1]}"
        self._open: dict[socket.socket, End | None] = {}
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name="collective-accept", daemon=True)
        self._accepting.start()

    @property
    def address(self) -> str:
        """`collective:<host>:<port>`."""
        return self._address

    def close(self) -> None:
        """Hang up on every caller and join every thread; a handler at work is waited for."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
        with suppress(OSError):  # some systems refuse it for what only listens
            self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:  # to their ends, at which their groups' own threads end
            thread.join()

    def hang_up(self) -> None:
        """End every connection that is open now; callers may come again."""
        with self._guard:
            connections = dict(self._open)
        for connection, end in connections.items():
            if end is not None:
                end.shut()
            else:
                _shut(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("%s: cannot accept: %s", self._address, error)
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="collective-serve", daemon=True
            )
            with self._guard:
                if self._closed:
                    connection.close()
                    return
                self._open[connection] = None
                self._threads = [one for one in self._threads if one.is_alive()]
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        peer = "a caller"
        end = None
        try:
            peer = str(connection.getpeername())
            end = End(connection, _HOST, peer=peer, interface=self._host, timeout=_FORMING)
            with self._guard:
                self._open[connection] = end
            if self._closed:
                return
            while True:
                self._answer(end)
        except ProtocolError as error:
            _log.warning("%s: hung up on %s: %s", self._address, peer, error)
        except (ChannelError, OSError):
            pass  # the caller hung up
        finally:
            with self._guard:
                self._open.pop(connection, None)
            if end is not None:
                end.close()
            connection.close()

    def _answer(self, end: End) -> None:
        text, size, inline = end.head()
        name, placed = headers.read_request(text, size)
        outcome = call(self._handler, Request(name, end.payload(placed, inline, None)))
        if isinstance(outcome, Exception):
            end.send(headers.error_text(outcome), headers.layout(()), ())
            return
        try:
            payload = headers.layout(outcome)
            end.send(headers.reply_text(payload), payload, outcome)
        except ProtocolError as error:  # what the handler returned cannot travel
            end.send(headers.error_text(error), headers.layout(()), ())


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)


def serve(handler: Handler, *, bind: str = "127.0.0.1:0") -> CollectiveServer:
    """Let any process that reaches `bind` call `handler`, which runs in one thread a connection.

    Raises:
        ResourceError: TLS is asked for.
        ChannelError: `bind` is taken or not of this machine.
    """
    return CollectiveServer(handler, bind=bind)


def connect(address: str, *, timeout: float = 30.0) -> Channel:
    """Open a channel to a server of any machine.

    Raises:
        ChannelTimeout: the server does not answer in time.
        ChannelError: nobody listens there, or no group forms.
    """
    host, _, port = address.removeprefix("collective:").rpartition(":")
    deadline = time.monotonic() + timeout
    try:
        connection = socket.create_connection((host, int(port)), timeout)
    except TimeoutError as error:
        raise ChannelTimeout(f"{address} does not accept connections within {timeout} s") from error
    except OSError as error:
        raise ChannelError(f"nobody listens at {address} ({error}); has its process ended?") from error
    try:
        interface = connection.getsockname()[0]
        left = deadline - time.monotonic()
        end = End(connection, _CALLER, peer=address, interface=interface, timeout=left)
        return CollectiveChannel(address, end)
    except BaseException:
        connection.close()
        raise


__all__ = ["CollectiveChannel", "CollectiveServer", "connect", "serve"]
