"""One end of a connection between two processes on one GPU: messages, whose tensors stay in its memory.

A message with tensors of the GPU is two packets of `channels.shm.doorbell`: a note, which says where those
lie, and the message with empty tensors in their places. No end waits for the GPU, see
`channels.cuda.device_memory`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from channels.cuda.device_memory import DeviceMemory, DevicePool, DeviceSegment
from channels.framing import header as headers
from channels.framing.header import Layout, TensorSpan
from channels.shm.doorbell import Doorbell, Packet
from errors import ChannelError, ProtocolError, ResourceError

_NOTE: Final = struct.Struct("<IQHHH")
"""Segment, its capacity if it is new, bytes of its handle, number of released segments, number of tensors."""
TRIAL_BYTES: Final = 1 << 16  # bytes of the segment of a greeting


class DeviceTensors(NamedTuple):
    """The tensors of a message that are on the GPU: their segment, indices and spans."""

    number: int
    segment: DeviceSegment
    places: tuple[int, ...]
    spans: tuple[TensorSpan, ...]

    def into(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The message's tensors, with views of these in the places of the empty ones."""
        whole = list(tensors)
        for at, where in zip(self.places, self.spans, strict=True):
            if at >= len(whole):
                raise ProtocolError(f"a note names tensor {at} of a message with {len(whole)} tensors")
            whole[at] = _view(self.segment.memory, where)
        return whole


class TakenSegments(NamedTuple):
    """Numbers of the segments that a message uses, of the CPU's memory and of the GPU's; None for none."""

    cpu: int | None
    device: int | None


class CudaEnd:
    """One end of a connection, used by one thread at a time."""

    def __init__(self, bell: Doorbell, memory: DeviceMemory) -> None:
        self.bell = bell
        self.memory = memory
        self.caller = bell.caller
        self._pool = DevicePool(memory)
        self._open: dict[int, DeviceSegment] = {}  # segments of the peer
        self._done: deque[int] = deque()  # of these, the ones that this end has released
        self._tried: DeviceSegment | None = None

    def greet(self, *, first: bool, deadline: float | None = None) -> None:
        """Check that each end can open the other's memory, which drivers and containers may prevent.

        Args:
            first: Whether this end sends first.

        Raises:
            ChannelTimeout: The deadline passed.
            ChannelError: The peer's memory cannot be opened.
        """
        try:
            if first:
                self._offer()
            packet = self.bell.receive(deadline)
            if not packet.note:
                raise ProtocolError("a message came before the greeting")
            self.memory.open(packet.text, TRIAL_BYTES)
            if not first:
                self._offer()
        except (ProtocolError, ResourceError) as error:
            raise ChannelError(f"{self.caller}: processes cannot share the GPU's memory: {error}") from None

    def _offer(self) -> None:
        self._tried, handle = self.memory.make(
            TRIAL_BYTES
        )  # which is there for as long as the peer may open it
        self.bell.note(handle)

    def send(self, text: Callable[[Layout], bytes], tensors: Sequence[Tensor]) -> TakenSegments:
        """Send a message; the segments that it uses.

        Raises:
            ProtocolError, ResourceError: It cannot be written, and nothing was sent.
            ChannelError: The peer is gone, or has received a part of it.
        """
        places = [at for at, tensor in enumerate(tensors) if self.memory.takes(tensor.device)]
        of_cpu = list(tensors)
        for at in places:
            of_cpu[at] = torch.empty(0, dtype=tensors[at].dtype)
        payload = headers.layout(of_cpu)
        written = text(payload)
        if not places:
            return TakenSegments(self.bell.send(written, payload, of_cpu), None)
        number = self._put(places, tensors)
        try:
            return TakenSegments(self.bell.send(written, payload, of_cpu), number)
        except (ProtocolError, ResourceError) as error:
            raise ChannelError(f"{self.caller}: closed in the middle of a message: {error}") from error

    def _put(self, places: Sequence[int], tensors: Sequence[Tensor]) -> int:
        of_device = [tensors[at].detach() for at in places]
        layout = headers.layout(of_device)
        headers.require_fit(layout.size)
        number, segment, new = self._pool.take(max(1, layout.size))
        with _calls():
            segment.before_writing()
            for tensor, where in zip(of_device, layout.spans, strict=True):
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

    def receive(self, deadline: float | None = None) -> tuple[Packet, DeviceTensors | None]:
        """Wait for the next message, and its tensors on the GPU, if it has some.

        Raises:
            ChannelTimeout: The deadline passed.
            ChannelError: The peer is gone.
            ProtocolError: A packet is malformed.
        """
        packet = self.bell.receive(deadline)
        if not packet.note:
            return packet, None
        found = self._read(packet.text)
        packet = self.bell.receive(deadline)
        if packet.note:
            raise ProtocolError("two notes in a row")
        return packet, found

    def _read(self, note: bytes) -> DeviceTensors:
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
                raise ProtocolError(f"a note names device segment {number}, which is not open")
            spans = headers.read_reply(text, segment.memory.numel())
        except (struct.error, DecodeError) as error:
            raise ProtocolError(f"a note cannot be read: {error}") from None
        if len(spans) != n_places:
            raise ProtocolError(f"a note announces {n_places} tensors and has spans of {len(spans)}")
        for done in numbers[:n_done]:
            self._pool.release(done)
        with _calls():
            segment.before_reading()
        return DeviceTensors(number, segment, tuple(numbers[n_done:]), spans)

    def read(self, there: DeviceTensors | None, *, keeps: bool) -> None:
        """Release a message's tensors, all reads of which have been queued.

        Args:
            keeps: Whether the peer reuses its segment without a release message, once it has the reply.
        """
        if there is not None:
            with _calls():
                there.segment.read()
            if not keeps:
                self._done.append(there.number)

    def reusable(self, taken: TakenSegments) -> None:
        """Reuse the segments of a message that the peer has answered."""
        self.bell.reusable(taken.cpu)
        if taken.device is not None:
            self._pool.release(taken.device)

    def shut(self) -> None:
        """End the waits at both ends with an error. Any thread."""
        self.bell.shut()

    def close(self) -> None:
        """Free the connection and all segments."""
        self.bell.close()
        self._pool.clear()
        self._open.clear()
        self._tried = None


@contextmanager
def _calls() -> Iterator[None]:
    """Surrounds calls of the device: their errors, as on events of a peer that is gone, end the channel."""
    try:
        yield
    except RuntimeError as error:
        raise ChannelError(f"the device failed: {error}") from error


def _view(memory: Tensor, where: TensorSpan) -> Tensor:
    return memory[where.offset : where.end].view(where.dtype).view(where.shape)


__all__ = ["TRIAL_BYTES", "CudaEnd", "DeviceTensors", "TakenSegments"]
