"""The channel between two processes on one GPU: rows stay in its memory, the rest is shared memory's.

A message with tensors of the GPU is two packets of `channels.shm.doorbell`: a note, which says where those
lie, and the message with empty tensors in their places. No end waits for the GPU: see
`channels.cuda.device_memory`.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Final, NamedTuple

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from channels.base import Channel, Handler, Request
from channels.cuda.cuda_memory import CudaMemory
from channels.cuda.device_memory import DeviceMemory, DevicePool, DeviceSegment
from channels.framing import header as headers
from channels.framing.accepting import AcceptingServer
from channels.framing.header import Layout, Placement
from channels.framing.pipe import Pipe, Reply, call
from channels.locality import machine_id
from channels.shm.abstract_sockets import dial, listen
from channels.shm.doorbell import Doorbell, Packet
from errors import ChannelError, ProtocolError, ResourceError

_NOTE: Final = struct.Struct("<IQHHH")
"""Segment, its capacity if it is new, bytes of its handle, segments done with, tensors."""
_FORMING: Final = 30.0
"""Seconds that a host gives a caller to greet it."""
_TRIAL: Final = 1 << 16  # bytes of a segment that nothing is sent in


class _OnDevice(NamedTuple):
    """Tensors of a message that are on the GPU: which of the message's, and where they lie."""

    number: int
    segment: DeviceSegment
    places: tuple[int, ...]
    placed: tuple[Placement, ...]

    def into(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A message's tensors with views of these in the places of empty ones."""
        whole = list(tensors)
        for at, where in zip(self.places, self.placed, strict=True):
            if at >= len(whole):
                raise ProtocolError(f"a note tells of tensor {at} of a message with {len(whole)}")
            whole[at] = _view(self.segment.memory, where)
        return whole


class Segments(NamedTuple):
    """Of the CPU's memory and of the GPU's, that a message took; None where it took none."""

    cpu: int | None
    device: int | None


class End:
    """One end of a connection; one thread uses it at a time."""

    def __init__(self, bell: Doorbell, memory: DeviceMemory) -> None:
        self.bell = bell
        self.memory = memory
        self.caller = bell.caller
        self._pool = DevicePool(memory)
        self._open: dict[int, DeviceSegment] = {}  # the peer's
        self._done: deque[int] = deque()  # of these, with which ones this end is done
        self._tried: DeviceSegment | None = None

    def greet(self, *, first: bool, deadline: float | None = None) -> None:
        """Find out whether each end can open what the other makes: drivers and containers may not let it.

        Args:
            first: whether this end begins.

        Raises:
            ChannelTimeout: the deadline passed.
            ChannelError: it cannot.
        """
        try:
            if first:
                self._offer()
            packet = self.bell.receive(deadline)
            if not packet.note:
                raise ProtocolError("a message ahead of the segment to try")
            self.memory.open(packet.text, _TRIAL)
            if not first:
                self._offer()
        except (ProtocolError, ResourceError) as error:
            raise ChannelError(f"{self.caller}: processes cannot share the GPU's memory: {error}") from None

    def _offer(self) -> None:
        self._tried, handle = self.memory.make(_TRIAL)  # which is there for as long as the peer may open it
        self.bell.note(handle)

    def send(self, text: Callable[[Layout], bytes], tensors: Sequence[Tensor]) -> Segments:
        """Send a message; which segments it took.

        Raises:
            ProtocolError, ResourceError: it cannot be written, and nothing has left.
            ChannelError: the peer is gone, or has had a part of it.
        """
        places = [at for at, tensor in enumerate(tensors) if self.memory.takes(tensor.device)]
        of_cpu = list(tensors)
        for at in places:
            of_cpu[at] = torch.empty(0, dtype=tensors[at].dtype)
        payload = headers.layout(of_cpu)
        written = text(payload)
        if not places:
            return Segments(self.bell.send(written, payload, of_cpu), None)
        number = self._put(places, tensors)
        try:
            return Segments(self.bell.send(written, payload, of_cpu), number)
        except (ProtocolError, ResourceError) as error:
            raise ChannelError(f"{self.caller}: closed in the middle of a message: {error}") from error

    def _put(self, places: Sequence[int], tensors: Sequence[Tensor]) -> int:
        of_device = [tensors[at].detach() for at in places]
        layout = headers.layout(of_device)
        headers.require_fit(layout.size)
        number, segment, new = self._pool.take(max(1, layout.size))
        with _calls():
            segment.before_writing()
            for tensor, where in zip(of_device, layout.placed, strict=True):
                _view(segment.memory, where).copy_(tensor)
            segment.written()
        done = [self._done.popleft() for _ in range(len(self._done))]
        handle, capacity = (b"", 0) if new is None else (new, segment.memory.numel())
        self.bell.note(
            _NOTE.pack(number, capacity, len(handle), len(done), len(places))
            + struct.pack(f"<{len(done)}I{len(places)}H", *done, *places)
            + handle
            + headers.reply_text(layout)
        )
        return number

    def receive(self, deadline: float | None = None) -> tuple[Packet, _OnDevice | None]:
        """The next message, and what of it is on the GPU.

        Raises:
            ChannelTimeout: the deadline passed.
            ChannelError: the peer is gone.
            ProtocolError: what came is none of ours.
        """
        packet = self.bell.receive(deadline)
        if not packet.note:
            return packet, None
        found = self._read(packet.text)
        packet = self.bell.receive(deadline)
        if packet.note:
            raise ProtocolError("two notes in a row")
        return packet, found

    def _read(self, note: bytes) -> _OnDevice:
        try:
            number, capacity, n_handle, n_done, n_places = _NOTE.unpack_from(note)
            form = f"<{n_done}I{n_places}H"
            numbers = struct.unpack_from(form, note, _NOTE.size)
            start = _NOTE.size + struct.calcsize(form)
            handle, text = note[start : start + n_handle], note[start + n_handle :]
            if capacity:
                self._open[number] = self.memory.open(handle, capacity)
            segment = self._open.get(number)
            if segment is None:
                raise ProtocolError(f"a note names device segment {number}, of which it has not told")
            placed = headers.read_reply(text, segment.memory.numel())
        except (struct.error, DecodeError) as error:
            raise ProtocolError(f"a note cannot be read: {error}") from None
        if len(placed) != n_places:
            raise ProtocolError(f"a note tells of {n_places} tensors and places {len(placed)}")
        for done in numbers[:n_done]:
            self._pool.release(done)
        with _calls():
            segment.before_reading()
        return _OnDevice(number, segment, tuple(numbers[n_done:]), placed)

    def read(self, there: _OnDevice | None, *, keeps: bool) -> None:
        """All reads of a message's tensors have been queued.

        Args:
            keeps: the peer takes its segment back of itself, when it has the answer.
        """
        if there is not None:
            with _calls():
                there.segment.read()
            if not keeps:
                self._done.append(there.number)

    def reusable(self, taken: Segments) -> None:
        """The peer has answered the message that took these."""
        self.bell.reusable(taken.cpu)
        if taken.device is not None:
            self._pool.release(taken.device)

    def shut(self) -> None:
        """Wake whoever waits at either end, with an error. Any thread."""
        self.bell.shut()

    def close(self) -> None:
        """Give everything back."""
        self.bell.close()
        self._pool.clear()
        self._open.clear()
        self._tried = None


@contextmanager
def _calls() -> Iterator[None]:
    """Around calls of the device: what they fail with, as on events of a peer that is gone, ends the pipe."""
    try:
        yield
    except RuntimeError as error:
        raise ChannelError(f"the device failed: {error}") from error


def _view(memory: Tensor, where: Placement) -> Tensor:
    return memory[where.offset : where.end].view(where.dtype).view(where.shape)


class CudaChannel(Pipe):
    """The router's end."""

    def __init__(self, name: str, end: End) -> None:
        super().__init__(name)
        self._end = end
        self._written: deque[Segments] = deque()

    def takes(self, device: torch.device) -> bool:
        """See `channels.base.Channel`."""
        return device.type == "cpu" or self._end.memory.takes(device)

    def _send(self, request: Request) -> None:
        sent = self._end.send(lambda payload: headers.request_text(request.id, payload), request.tensors)
        self._written.append(sent)

    def _receive(self, deadline: float | None) -> Reply:
        packet, there = self._end.receive(deadline)
        if not self._written:
            raise ProtocolError(f"{self.name} replies to a request that nobody made")
        self._end.reusable(self._written.popleft())
        try:
            placed = headers.read_reply(packet.text, packet.size)
            tensors: Sequence[Tensor] = packet.tensors(placed)
            if there is not None:
                tensors = there.into(tensors)
            return tuple([tensor.clone() for tensor in tensors])
        finally:
            self._end.bell.done_with(packet.segment)
            self._end.read(there, keeps=False)

    def _hang_up(self) -> None:
        self._end.close()

    def _wake(self) -> None:
        self._end.shut()


class CudaServer(AcceptingServer[End]):
    """The host's end."""

    def __init__(self, handler: Handler, memory: DeviceMemory, place: str) -> None:
        self._handler, self._memory = handler, memory
        listener, name = listen()
        super().__init__(listener, f"cuda:{place}/{name}")
        self.start()

    def _begin(self, connection: socket.socket) -> End:
        end = End(Doorbell(connection), self._memory)
        try:
            end.greet(first=False, deadline=time.monotonic() + _FORMING)
        except BaseException:
            end.close()
            raise
        return end

    def _talk(self, found: End) -> None:
        while True:
            packet, there = found.receive()
            name, placed = headers.read_request(packet.text, packet.size)
            tensors: Sequence[Tensor] = packet.tensors(placed)
            if there is not None:
                tensors = there.into(tensors)
            outcome = call(self._handler, Request(name, tuple(tensors)))
            found.read(there, keeps=True)
            if not isinstance(outcome, Exception):
                try:
                    found.send(headers.reply_text, outcome)
                    continue
                except (ProtocolError, ResourceError) as error:  # what the handler returned cannot travel
                    outcome = error
            found.send(partial(_failure, outcome), ())


def _failure(error: Exception, _: Layout) -> bytes:
    return headers.error_text(error)


@cache
def gpu_place(device: torch.device) -> str:
    """Equal for processes that compute on the same GPU of the same machine, `<machine>-<GPU>`."""
    return f"{machine_id()}-{torch.cuda.get_device_properties(device).uuid}"


def serve(handler: Handler, device: torch.device) -> CudaServer:
    """Let processes on this GPU reach `handler`, which runs in one thread a connection."""
    return CudaServer(handler, CudaMemory(device), gpu_place(device))


def connect(address: str, *, timeout: float = 30.0, device: torch.device | None = None) -> Channel:
    """Open a channel to a server on this GPU.

    Raises:
        ChannelTimeout: the server does not accept in time.
        ChannelError: it is on another GPU, gone, or of another user.
    """
    if device is None:
        raise ChannelError(f"{address} is on a GPU, and this process computes on none; use auto")
    return open_channel(address, CudaMemory(device), gpu_place(device), timeout=timeout)


def open_channel(address: str, memory: DeviceMemory, here: str, *, timeout: float = 30.0) -> CudaChannel:
    """The same for memory of a place.

    Raises:
        ChannelTimeout, ChannelError: see `connect`.
    """
    there, _, name = address.removeprefix("cuda:").partition("/")
    if there != here:
        raise ChannelError(f"{address} is on another GPU than this process ({here}); use auto")
    deadline = time.monotonic() + timeout
    connection = dial(name, address, timeout)
    try:
        end = End(Doorbell(connection), memory)
        end.greet(first=True, deadline=deadline)
    except BaseException:
        connection.close()
        raise
    return CudaChannel(address, end)


__all__ = ["CudaChannel", "CudaServer", "connect", "gpu_place", "open_channel", "serve"]
