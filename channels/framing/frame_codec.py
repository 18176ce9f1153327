"""Frames of a byte stream: each is a protobuf message and a buffer that is read in place.

A frame is `raymoe.v1.Frame { header = 1; padding = 14; payload = 15 }`. Protobuf's own code would copy the
payload into the message and again into the frame, and once more to read it; so tag and length are written by
hand (one join is the only copy) and read by hand (tensors are views of the frame). Other clients use their
generated code, with the fields in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from channels.base import Request
from channels.framing import header as headers
from channels.framing.buffers import COPIED_BELOW, OwnedBuffer, address_of, buffer_of, tensor_at
from channels.framing.header import ALIGNMENT, Layout, TensorSpan, varint
from errors import ProtocolError

_HEADER_TAG: Final = b"\x0a"  # field 1, length-delimited
_PADDING_TAG: Final = b"\x72"  # field 14
_PAYLOAD_TAG: Final = b"\x7a"  # field 15
_FIXED_SIZE: Final = {1: 8, 5: 4}
_ZEROS: Final = bytes(2 * ALIGNMENT)


def encode_request(request: Request) -> bytes:
    """The frame of a request.

    Raises:
        ProtocolError: The wire cannot carry the id or a dtype.
    """
    payload = headers.layout(request.tensors)
    return _encode(headers.request_text(request.id, payload), payload, request.tensors)


def encode_reply(tensors: Sequence[torch.Tensor]) -> bytes:
    """The frame of a reply without an error."""
    payload = headers.layout(tensors)
    return _encode(headers.reply_text(payload), payload, tensors)


def encode_error(error: Exception) -> bytes:
    """The frame of a reply with an error."""
    return _encode(headers.error_text(error), headers.layout(()), ())


def decode_request(frame: bytes) -> Request:
    """Read a request; large tensors are views of `frame`, which must not be used for anything else.

    Raises:
        ProtocolError: The frame is malformed.
    """
    text, size, start = _split(frame)
    name, spans = headers.read_request(text, size)
    return Request(name, _views(frame, spans, size, start))


def decode_reply(frame: bytes) -> tuple[torch.Tensor, ...]:
    """Read a reply; large tensors are views of `frame`, which must not be used for anything else.

    Raises:
        RemoteError: The reply is an error (StaleEpoch stays a StaleEpoch).
        ProtocolError: The frame is malformed.
    """
    text, size, start = _split(frame)
    return _views(frame, headers.read_reply(text, size), size, start)


def _encode(text: bytes, payload: Layout, tensors: Sequence[torch.Tensor]) -> bytes:
    head = _HEADER_TAG + varint(len(text)) + text
    if not tensors:
        return head
    tail = _PAYLOAD_TAG + varint(payload.size)
    # The padding field itself takes two bytes at least; its length fits one (< 128).
    padding = -(len(head) + 2 + len(tail)) % ALIGNMENT
    parts: list[Any] = [head, _PADDING_TAG, bytes((padding,)), _ZEROS[:padding], tail]
    end = 0
    for tensor, where in zip(tensors, payload.spans, strict=True):
        if where.offset != end:
            parts.append(_ZEROS[: where.offset - end])
        if where.elements:
            parts.append(buffer_of(tensor))
        end = where.end
    return b"".join(parts)


def _read_varint(frame: bytes, at: int) -> tuple[int, int]:
    """The varint at byte `at`, and the index of the byte after it."""
    if at < len(frame) and frame[at] < 0x80:
        return frame[at], at + 1
    value = shift = 0
    while shift < 64 and at < len(frame):
        byte = frame[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ProtocolError(
        f"a frame of {len(frame)} bytes ends within a number, or has one of more than 64 bits, at byte {at}"
    )


def _split(frame: bytes) -> tuple[bytes, int, int]:
    """The header's text, the size of the payload, and the index of its first byte."""
    texts = []
    size = start = at = 0
    while at < len(frame):
        tag, at = _read_varint(frame, at)
        field, wire = tag >> 3, tag & 7
        if wire == 2:
            length, at = _read_varint(frame, at)
        elif wire == 0:
            _, at = _read_varint(frame, at)
            length = 0
        elif wire in _FIXED_SIZE:
            length = _FIXED_SIZE[wire]
        else:
            raise ProtocolError(f"a frame has a field of unknown wire type {wire} before byte {at}")
        if at + length > len(frame):
            raise ProtocolError(
                f"field {field} of a frame ends at byte {at + length}, but the frame has {len(frame)} bytes"
            )
        if (field in (1, 14, 15) and wire != 2) or not field:
            raise ProtocolError(
                f"field {field} of a frame has wire type {wire}; frames of raymoe have another one"
            )
        if field == 1:
            texts.append(frame[at : at + length])  # as in protobuf: occurrences of a message merge
        elif field == 15:
            size, start = length, at
        at += length
    return texts[0] if len(texts) == 1 else b"".join(texts), size, start


def _views(frame: bytes, spans: Sequence[TensorSpan], size: int, start: int) -> tuple[torch.Tensor, ...]:
    if size < COPIED_BELOW:
        memory, address = np.frombuffer(frame, np.uint8, size, start).copy(), 0
    else:
        address = address_of(np.frombuffer(frame, np.uint8)) + start
        memory = np.asarray(OwnedBuffer(frame, address, size))
    return tuple([tensor_at(memory, address, where) for where in spans])


__all__ = [
    "decode_reply",
    "decode_request",
    "encode_error",
    "encode_reply",
    "encode_request",
]
