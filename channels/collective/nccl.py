"""The collective channel between two GPUs: tensors of the CPU come with the header, those of a GPU by NCCL.

NCCL works in the order of its calls, so each direction has a group of its own: in a single one, a request
whose receive is not posted yet would block the reply that its receiver has to send. A lane thus has two
communicators with each host, and their memory: many hosts are better reached by another channel. A wait for
rows has a timeout, after which it ends the group: NCCL itself would wait without a limit.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol

import torch
import torch.distributed
from torch import Tensor

from channels.base import Channel, Handler
from channels.collective import channel as collective
from channels.collective.channel import CollectiveServer
from channels.collective.rendezvous import Rendezvous
from channels.framing import header as headers
from channels.framing.buffers import address_of, buffer_of, tensor_at
from channels.framing.header import MAX_MESSAGE, Layout, TensorSpan
from channels.framing.message_socket import Head, MessageSocket, remaining
from channels.framing.ordered_channel import Reply
from errors import ChannelError, ChannelTimeout, ProtocolError

KIND: Final = "nccl"
_dist: Any = torch.distributed
_CALLER: Final = 0
_MASK: Final = 8  # bytes ahead of a header's text: a bit for each tensor that is on the GPU
_PATIENCE: Final = timedelta(days=1)  # a group's timeout; waits have timeouts of their own
_LATE: Final = 5.0
"""Seconds to wait for a payload after its header, beside the time that its bytes take."""
_SLOWEST: Final = 1e8
"""Least bytes per second of a payload."""
_LOOK: Final = 5e-6  # seconds between two checks of whether rows have come


class OneWayGroup(Protocol):
    """A process group for one direction: tensors are received in the order in which they were sent."""

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        ...

    def send(self, tensor: Tensor) -> Any:
        """Begin to send; the result has to be kept until the peer has received the tensor."""
        ...

    def receive(self, tensor: Tensor, limit: float, ended: Callable[[], bool]) -> None:
        """Receive into a tensor, within `limit` seconds.

        Args:
            ended: Whether the wait has to end.

        Raises:
            TimeoutError: It did not come in time; the group cannot be used any more.
            RuntimeError: The peer is gone.
        """
        ...

    def end(self) -> None:
        """End all operations of the group. Any thread."""
        ...


MakeGroup = Callable[[Rendezvous, int, str, str, float], OneWayGroup]
"""(rendezvous, rank, name, interface, seconds) -> a group of this name."""


class NcclEnd:
    """A `RankEnd` between GPUs.

    Args:
        rank: 0 for the caller, 1 for the host.
        peer: The peer's address, for messages.
        interface: Address of this machine to communicate over.
        timeout: Seconds for the groups to form.
        make: Forms a group; None makes an `NcclGroup` on `device`.

    Raises:
        ChannelError: The groups do not form.
    """

    def __init__(
        self,
        connection: socket.socket,
        rank: int,
        *,
        peer: str,
        interface: str,
        timeout: float,
        make: MakeGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.caller = peer
        self._ended = threading.Event()
        # Only a caller's messages have large tensors of the CPU, and a host reads them whatever it is
        # writing.
        self._socket = MessageSocket(connection, peer, inline=MAX_MESSAGE)
        rendezvous = Rendezvous(self._socket, time.monotonic() + timeout)
        form = make or partial(NcclGroup, device=device)
        both: list[OneWayGroup] = []
        try:
            for name in ("there", "back"):
                both.append(form(rendezvous, rank, name, interface, timeout))
            # Groups form at their first use, over the rendezvous; afterwards the connection carries messages
            # only.
            for group, sends in zip(both, (rank == _CALLER, rank != _CALLER), strict=True):
                hello = torch.zeros(1, device=group.device)
                self._hello = group.send(hello) if sends else self._receive(hello, group, timeout)
        except BaseException as error:
            for group in both:
                group.end()
            if isinstance(error, RuntimeError):
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ChannelError(f"no process group with {peer}: {said}") from None
            raise
        rendezvous.end()
        self._out, self._in = both if rank == _CALLER else reversed(both)
        self._leaving: deque[tuple[list[Any], list[Tensor]]] = deque()
        self._left = self._received = 0  # payloads with tensors of the GPU

    def takes(self, device: torch.device) -> bool:
        return device == self._out.device

    def send(self, text: bytes, payload: Layout, tensors: Sequence[Tensor]) -> None:
        headers.require_fit(payload.size)
        there = [tensor.device == self._out.device for tensor in tensors]
        mask = sum(1 << at for at, far in enumerate(there) if far)
        ours = [tensor for tensor, far in zip(tensors, there, strict=True) if not far]
        near: list[Any] = [buffer_of(tensor) for tensor in ours if tensor.numel()]
        text = mask.to_bytes(_MASK, "little") + text
        self._socket.write(Head(text, payload.size, b"".join(near), self._received))
        far_ones = [tensor.detach().contiguous() for tensor, far in zip(tensors, there, strict=True) if far]
        if far_ones:
            try:
                self._leaving.append(([self._out.send(one) for one in far_ones if one.numel()], far_ones))
            except RuntimeError as error:
                raise ChannelError(f"{self.caller} closed the connection; has its process ended?") from error

    def head(self, deadline: float | None = None) -> Head:
        head = self._socket.read(deadline)
        while self._leaving and self._left < head.received:
            self._leaving.popleft()
            self._left += 1
        if len(head.text) < _MASK:
            raise ProtocolError("a header that does not say which tensors are on the GPU")
        self._mask = int.from_bytes(head.text[:_MASK], "little")
        return head._replace(text=head.text[_MASK:])

    def payload(self, spans: tuple[TensorSpan, ...], head: Head, deadline: float | None) -> Reply:
        near = [(at, where) for at, where in enumerate(spans) if not self._mask >> at & 1]
        sizes = [where.end - where.offset for _, where in near]
        if sum(sizes) != len(head.inline):
            raise ProtocolError(f"{len(head.inline)} bytes came with a header of {sum(sizes)}")
        found: list[Any] = [None] * len(spans)
        memory = torch.frombuffer(head.inline, dtype=torch.uint8).numpy() if head.inline else None
        start = 0
        for (at, where), size in zip(near, sizes, strict=True):
            if memory is None or not size:
                found[at] = torch.empty(where.shape, dtype=where.dtype)
                continue
            # A copy: its place may not be aligned.
            piece = memory[start : start + size].copy()
            found[at] = tensor_at(piece, address_of(piece), where._replace(offset=0, end=size))
            start += size
        for at, where in enumerate(spans):
            if found[at] is None:
                tensor = torch.empty(where.shape, dtype=where.dtype, device=self._in.device)
                limit = _LATE + tensor.nbytes / _SLOWEST
                left = limit if deadline is None else min(limit, self._remaining(deadline))
                found[at] = self._receive(tensor, self._in, left) if tensor.numel() else tensor
        self._received += any(self._mask >> at & 1 for at in range(len(spans)))
        return tuple(found)

    def shut(self) -> None:
        self._ended.set()
        self._socket.shut()

    def close(self) -> None:
        self.shut()
        self._socket.close()
        for group in (self._out, self._in):
            group.end()
        self._leaving.clear()

    def _receive(self, tensor: Tensor, group: OneWayGroup, limit: float) -> Tensor:
        try:
            group.receive(tensor, limit, self._ended.is_set)
            return tensor
        except TimeoutError:
            raise ChannelTimeout(f"{self.caller} does not answer") from None
        except RuntimeError as error:
            raise ChannelError(f"{self.caller} stalled or is gone; has its process ended?") from error

    def _remaining(self, deadline: float) -> float:
        try:
            return remaining(deadline) or _LATE
        except TimeoutError:
            raise ChannelTimeout(f"{self.caller} does not answer") from None


_making = threading.Lock()
_BLOCKING: Final = "TORCH_NCCL_BLOCKING_WAIT"


@contextmanager
def _raising() -> Iterator[None]:
    """Surrounds the making of a group whose `wait` raises the errors of operations.

    Otherwise `wait` raises nothing, and NCCL's watchdog ends the whole process. Torch takes this choice from
    the environment only.
    """
    with _making:
        before = os.environ.get(_BLOCKING)
        os.environ[_BLOCKING] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_BLOCKING]
            else:
                os.environ[_BLOCKING] = before


class NcclGroup:
    """A `OneWayGroup` of NCCL."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        rank: int,
        name: str,
        interface: str,
        timeout: float,
        *,
        device: torch.device | None = None,
    ) -> None:
        if device is None:
            raise ChannelError("nccl is between GPUs, and this process computes on none; use auto")
        self.device = torch.device("cuda", device.index or 0)
        self._peer = 1 - rank
        self._rendezvous = rendezvous  # the group's own thread reads it for as long as the group lives
        options = _dist.ProcessGroupNCCL.Options()
        # NCCL's watchdog ends the process when it passes, and a request may wait long for its host.
        options._timeout = _PATIENCE
        with _raising():
            self._group = _dist.ProcessGroupNCCL(_dist.PrefixStore(name, rendezvous), rank, 2, options)

    def send(self, tensor: Tensor) -> Any:
        return self._group.send([tensor], self._peer, 0)

    def receive(self, tensor: Tensor, limit: float, ended: Callable[[], bool]) -> None:
        work = self._group.recv([tensor], self._peer, 0)
        deadline = time.monotonic() + limit
        while not work.is_completed():
            if ended():
                raise RuntimeError("the wait was ended")
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError
            time.sleep(_LOOK)
        work.wait()  # work that is queued from here on finds the rows; raises if a failure has completed it

    def end(self) -> None:
        self._group.abort()


def serve(handler: Handler, device: torch.device, *, bind: str = "127.0.0.1:0") -> CollectiveServer:
    """Serve `handler` to processes of any machine that compute on another GPU.

    Args:
        device: This process's GPU.
        bind: `host:port`; port 0 takes a free one.

    Raises:
        ResourceError: TLS is configured.
        ChannelError: `bind` is taken, or is not an address of this machine.
    """
    return CollectiveServer(handler, bind=bind, end=partial(NcclEnd, device=device), kind=KIND)


def connect(address: str, *, timeout: float = 30.0, device: torch.device | None = None) -> Channel:
    """Open a channel to a server of any machine.

    Raises:
        ChannelTimeout: The server does not answer in time.
        ChannelError: No server listens there, no group forms, or this process computes on no GPU.
    """
    end = partial(NcclEnd, device=device)
    return collective.connect(address, timeout=timeout, end=end, kind=KIND)


__all__ = ["MakeGroup", "NcclEnd", "OneWayGroup", "connect", "serve"]
