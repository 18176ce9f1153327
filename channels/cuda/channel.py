"""The channel between two processes on one GPU: rows stay in its memory, the rest uses shared memory."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor

from channels.base import Channel, Handler, Request
from channels.cuda.cuda_end import CudaEnd, TakenSegments
from channels.cuda.cuda_memory import CudaMemory
from channels.cuda.device_memory import DeviceMemory
from channels.framing import header as headers
from channels.framing.accepting import AcceptingServer
from channels.framing.header import Layout
from channels.framing.ordered_channel import OrderedChannel, Reply, call
from channels.locality import machine_id
from channels.shm.abstract_sockets import dial, listen
from channels.shm.doorbell import Doorbell
from errors import ChannelError, ProtocolError, ResourceError

_FORMING: Final = 30.0
"""Seconds that a host waits for a caller's greeting."""


class CudaChannel(OrderedChannel):
    """The router's end of the channel between processes on one GPU."""

    def __init__(self, name: str, end: CudaEnd) -> None:
        super().__init__(name)
        self._end = end
        self._written: deque[TakenSegments] = deque()

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu" or self._end.memory.takes(device)

    def _send(self, request: Request) -> None:
        sent = self._end.send(lambda payload: headers.request_text(request.id, payload), request.tensors)
        self._written.append(sent)

    def _receive(self, deadline: float | None) -> Reply:
        packet, there = self._end.receive(deadline)
        if not self._written:
            raise ProtocolError(f"{self.name} replies without a request")
        self._end.reusable(self._written.popleft())
        try:
            spans = headers.read_reply(packet.text, packet.size)
            tensors: Sequence[Tensor] = packet.tensors(spans)
            if there is not None:
                tensors = there.into(tensors)
            return tuple([tensor.clone() for tensor in tensors])
        finally:
            self._end.bell.done_with(packet.segment)
            self._end.read(there, keeps=False)

    def _disconnect(self) -> None:
        self._end.close()

    def _wake(self) -> None:
        self._end.shut()


class CudaServer(AcceptingServer[CudaEnd]):
    """The host's end of the channel between processes on one GPU."""

    def __init__(self, handler: Handler, memory: DeviceMemory, place: str) -> None:
        self._handler, self._memory = handler, memory
        listener, name = listen()
        super().__init__(listener, f"cuda:{place}/{name}")
        self.start()

    def _begin(self, connection: socket.socket) -> CudaEnd:
        end = CudaEnd(Doorbell(connection), self._memory)
        try:
            end.greet(first=False, deadline=time.monotonic() + _FORMING)
        except BaseException:
            end.close()
            raise
        return end

    def _talk(self, found: CudaEnd) -> None:
        while True:
            packet, there = found.receive()
            name, spans = headers.read_request(packet.text, packet.size)
            tensors: Sequence[Tensor] = packet.tensors(spans)
            if there is not None:
                tensors = there.into(tensors)
            outcome = call(self._handler, Request(name, tuple(tensors)))
            found.read(there, keeps=True)
            if not isinstance(outcome, Exception):
                try:
                    found.send(headers.reply_text, outcome)
                    continue
                except (ProtocolError, ResourceError) as error:  # the wire cannot carry the handler's reply
                    outcome = error
            found.send(partial(_failure, outcome), ())


def _failure(error: Exception, _: Layout) -> bytes:
    return headers.error_text(error)


@cache
def gpu_place(device: torch.device) -> str:
    """The place of a GPU, `<machine>-<GPU>`, equal for processes that compute on it."""
    return f"{machine_id()}-{torch.cuda.get_device_properties(device).uuid}"


def serve(handler: Handler, device: torch.device) -> CudaServer:
    """Serve `handler` to processes on this GPU, in one thread per connection."""
    return CudaServer(handler, CudaMemory(device), gpu_place(device))


def connect(address: str, *, timeout: float = 30.0, device: torch.device | None = None) -> Channel:
    """Open a channel to a server on this GPU.

    Raises:
        ChannelTimeout: The server does not accept in time.
        ChannelError: The server is on another GPU, gone, or of another user.
    """
    if device is None:
        raise ChannelError(f"{address} is on a GPU, and this process computes on none; use auto")
    return open_channel(address, CudaMemory(device), gpu_place(device), timeout=timeout)


def open_channel(address: str, memory: DeviceMemory, here: str, *, timeout: float = 30.0) -> CudaChannel:
    """Open a channel over some device memory.

    Args:
        here: The place of the memory's device, see `gpu_place`.

    Raises:
        ChannelTimeout, ChannelError: See `connect`.
    """
    there, _, name = address.removeprefix("cuda:").partition("/")
    if there != here:
        raise ChannelError(f"{address} is on another GPU than this process ({here}); use auto")
    deadline = time.monotonic() + timeout
    connection = dial(name, address, timeout)
    try:
        end = CudaEnd(Doorbell(connection), memory)
        end.greet(first=True, deadline=deadline)
    except BaseException:
        connection.close()
        raise
    return CudaChannel(address, end)


__all__ = ["CudaChannel", "CudaServer", "connect", "gpu_place", "open_channel", "serve"]
