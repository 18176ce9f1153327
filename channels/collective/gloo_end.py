"""One end of a collective channel between CPUs: small tensors come with the header, large ones by gloo.

The connection carries a header ahead of each payload, so that the receiver waits without a time limit while
nothing comes, and learns at once of a peer that died.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from channels.collective.rows import Rows
from channels.framing import header as headers
from channels.framing.buffers import address_of, buffer_of, tensor_at
from channels.framing.header import Layout, TensorSpan
from channels.framing.message_socket import INLINE, Head, MessageSocket
from channels.framing.ordered_channel import Reply
from errors import ProtocolError


class _Parts(NamedTuple):
    """The tensors of a payload, by the way that they are sent.

    Attributes:
        small: Indices of the tensors that come with the header, and their spans within its bytes.
        large: Indices of the tensors that come by the group, and their spans, each in memory of its own.
        inline: Bytes of the small tensors.
        bytes: Bytes of all tensors.
    """

    small: tuple[tuple[int, TensorSpan], ...]
    large: tuple[tuple[int, TensorSpan], ...]
    inline: int
    bytes: int


@lru_cache(maxsize=1024)
def _parts(spans: tuple[TensorSpan, ...]) -> _Parts:
    """Tensors are small, in their order, as long as there is room; cached, as calls of one size repeat."""
    small, large, at = [], [], 0
    for index, where in enumerate(spans):
        size = where.end - where.offset
        if at + size <= INLINE:
            small.append((index, where._replace(offset=at, end=at + size)))
            at += size
        else:
            large.append((index, where._replace(offset=0, end=size)))
    return _Parts(tuple(small), tuple(large), at, at + sum(where.end for _, where in large))


class GlooEnd:
    """A `RankEnd` between CPUs."""

    def __init__(
        self, connection: socket.socket, rank: int, *, peer: str, interface: str, timeout: float
    ) -> None:
        self.caller = peer
        self._socket = MessageSocket(connection, peer)
        self._rows = Rows(self._socket, rank, peer, interface, timeout)

    def send(self, text: bytes, payload: Layout, tensors: Sequence[torch.Tensor]) -> None:
        headers.require_fit(payload.size)
        parts = _parts(payload.spans)
        near: list[Any] = [buffer_of(tensors[at]) for at, where in parts.small if where.elements]
        inline = b"".join(near)
        head = Head(text, payload.size, inline, self._rows.received)
        if parts.large:
            self._rows.send([tensors[at] for at, _ in parts.large], lambda: self._socket.write(head))
        else:
            self._socket.write(head)

    def head(self, deadline: float | None = None) -> Head:
        self._rows.post_ahead()
        head = self._socket.read(deadline)
        self._rows.arrived(head.received)
        return head

    def payload(self, spans: tuple[TensorSpan, ...], head: Head, deadline: float | None) -> Reply:
        parts = _parts(spans)
        if parts.bytes > head.size:
            raise ProtocolError(f"tensors of {parts.bytes} bytes lie in a payload of {head.size}")
        if parts.inline != len(head.inline):
            raise ProtocolError(
                f"{len(head.inline)} bytes came with a header of {parts.inline} that are small"
            )
        found: list[Any] = [None] * len(spans)
        near = np.frombuffer(head.inline, np.uint8)
        address = address_of(near)
        for at, where in parts.small:  # while the large tensors are in flight
            found[at] = tensor_at(near, address, where)
        if parts.large:
            come = self._rows.receive([where for _, where in parts.large], deadline)
            for (at, _), tensor in zip(parts.large, come, strict=True):
                found[at] = tensor
        return tuple(found)

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def shut(self) -> None:
        self._socket.shut()

    def close(self) -> None:
        self.shut()
        self._socket.close()
        self._rows.close()


__all__ = ["GlooEnd"]
