"""Headers of requests and replies: the id of a call, its outcome, and the layout of its payload.

A header is the protobuf message `raymoe.v1.Header` on every kind of wire; each wire places the payload's
bytes in its own way. Everything that is read from a peer is checked here against the payload's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

import torch
from google.protobuf.message import DecodeError

from channels.base import Phase, RequestId
from channels.framing.limits import MAX_MESSAGE
from errors import ProtocolError, RaymoeError, RemoteError, StaleEpoch
from protos import expert_pb2, tensor_pb2

ALIGNMENT: Final = 64
MAX_TEXT: Final = 8192
_MAX_DIMENSIONS: Final = 8
_MAX_ELEMENTS: Final = 1 << 48

_WIRE_DTYPE: Final = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.int64: tensor_pb2.DTYPE_INT64,
}
_TORCH_DTYPE: Final = {int(wire): dtype for dtype, wire in _WIRE_DTYPE.items()}
_PHASES: Final = {int(phase): phase for phase in Phase}


class TensorSpan(NamedTuple):
    """The place of a tensor within a payload; `shape` as in torch, `offset` and `end` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    elements: int
    offset: int
    end: int


class Layout(NamedTuple):
    """The spans of tensors within a payload, the payload's size, and the header's text for both."""

    spans: tuple[TensorSpan, ...]
    size: int
    text: bytes


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_MAX_REMEMBERED: Final = 4096
_OK: Final = expert_pb2.Header(status=expert_pb2.Status()).SerializeToString()
_ID_TAG: Final = b"\x0a"  # field 1 of a header, length-delimited

_layouts: dict[tuple[tuple[torch.dtype, torch.Size], ...], Layout] = {}
_read_layouts: dict[tuple[int, ...], tuple[tuple[TensorSpan, ...], int]] = {}
_read_replies: dict[bytes, tuple[tuple[TensorSpan, ...], int]] = {}


_MAX_KEY: Final = 64  # most numbers of a layout that is remembered: a peer chooses it


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Cache a result, in bounds: calls of one size follow each other, layer by layer."""
    if len(known) >= _MAX_REMEMBERED:
        known.clear()
    known[key] = value
    return value


def layout(tensors: Sequence[torch.Tensor]) -> Layout:
    """Lay tensors out one after the other, aligned.

    Raises:
        ProtocolError: The wire does not know a dtype.
    """
    kinds = tuple([(tensor.dtype, tensor.shape) for tensor in tensors])
    return _layouts.get(kinds) or _remember(_layouts, kinds, _lay_out(tensors))


def _lay_out(tensors: Sequence[torch.Tensor]) -> Layout:
    spans = []
    numbers: list[int] = []
    end = 0
    for index, tensor in enumerate(tensors):
        wire = _WIRE_DTYPE.get(tensor.dtype)
        if wire is None:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WIRE_DTYPE)
            raise ProtocolError(f"tensor {index} is {tensor.dtype}; the wire carries {known}")
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        count = tensor.numel()
        end = offset + count * tensor.element_size()
        shape = tuple(tensor.shape)
        spans.append(TensorSpan(tensor.dtype, shape, count, offset, end))
        numbers += (wire, len(shape), *shape, offset)
    return Layout(tuple(spans), end, expert_pb2.Header(layout=numbers).SerializeToString())


def require_fit(size: int) -> None:
    """Check that a message is not longer than the peer accepts.

    Raises:
        ProtocolError: It has more than `MAX_MESSAGE` bytes.
    """
    if size > MAX_MESSAGE:
        mib = 1 << 20
        raise ProtocolError(
            f"{size / mib:.0f} MiB for one host in a message, and the limit is {MAX_MESSAGE // mib}: lower "
            "training.microbatch_size or serving.max_batch_tokens, or set more cluster.expert_hosts"
        )


def request_text(name: RequestId, payload: Layout) -> bytes:
    """The header of a request, in two parts, which protobuf merges when it reads them.

    Raises:
        ProtocolError: A field of the id does not fit the wire (int64, text).
    """
    try:
        id = expert_pb2.RequestId(
            run=name.run,
            epoch=name.epoch,
            step=name.step,
            microbatch=name.microbatch,
            layer=name.layer,
            phase=int(name.phase),  # type: ignore[arg-type]  # an int is what protobuf wants
            router=name.router,
        ).SerializeToString()
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name} does not fit the wire: {error}") from error
    return _ID_TAG + varint(len(id)) + id + payload.text


def reply_text(payload: Layout) -> bytes:
    """The header of a reply without an error."""
    return _OK + payload.text


def error_text(error: Exception) -> bytes:
    """The header of a reply with an error."""
    text = str(error)[:MAX_TEXT].encode("utf-8", "replace").decode()
    status = expert_pb2.Status(code=expert_pb2.CODE_FAILED, message=text, type=type(error).__name__)
    if isinstance(error, StaleEpoch):
        status.code, status.epoch = expert_pb2.CODE_STALE_EPOCH, error.epoch
    elif isinstance(error, RaymoeError):
        status.code = expert_pb2.CODE_REFUSED
    return expert_pb2.Header(status=status).SerializeToString()


def varint(value: int) -> bytes:
    """A number as protobuf encodes it."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_request(text: bytes, size: int) -> tuple[RequestId, tuple[TensorSpan, ...]]:
    """The id of a request, and the spans of its tensors in a payload of `size` bytes.

    Raises:
        ProtocolError: The header is malformed, its phase is unknown, or the payload cannot have this layout:
            an unknown dtype, an absurd shape, bytes outside of the payload.
    """
    header = _parse(text)
    if not header.HasField("id"):
        raise ProtocolError("a request's header has no id")
    wire = header.id
    phase = _PHASES.get(wire.phase)
    if phase is None:
        raise ProtocolError(
            f"a request has unknown phase {wire.phase}; this host knows 0 to {len(_PHASES) - 1}"
        )
    name = RequestId(wire.run, wire.epoch, wire.step, wire.microbatch, wire.layer, phase, wire.router)
    return name, _spans(header, size)[0]


def read_reply(text: bytes, size: int) -> tuple[TensorSpan, ...]:
    """The spans of a reply's tensors in a payload of `size` bytes.

    Raises:
        RemoteError: The reply is an error (StaleEpoch stays a StaleEpoch).
        ProtocolError: The header is malformed, or the payload cannot have this layout.
    """
    known = _read_replies.get(text)
    if known is not None and known[1] <= size:
        return known[0]
    header = _parse(text)
    if not header.HasField("status"):
        raise ProtocolError("a reply's header has no status")
    status = header.status
    if status.code == expert_pb2.CODE_STALE_EPOCH:
        raise StaleEpoch(status.message, epoch=status.epoch)
    if status.code != expert_pb2.CODE_OK:
        raise RemoteError(f"{status.type or 'error'}: {status.message}")
    found = _spans(header, size)
    return (_remember(_read_replies, text, found) if len(header.layout) <= _MAX_KEY else found)[0]


def _parse(text: bytes) -> expert_pb2.Header:
    try:
        return expert_pb2.Header.FromString(text)
    except DecodeError as error:
        raise ProtocolError(f"a header of {len(text)} bytes cannot be read: {error}") from error


def _spans(header: expert_pb2.Header, size: int) -> tuple[tuple[TensorSpan, ...], int]:
    """The spans in a header, checked against a payload of `size` bytes, and the end of the last one."""
    numbers = tuple(header.layout)
    known = _read_layouts.get(numbers)
    if known is not None and known[1] <= size:
        return known
    spans = _read_layout(numbers, size)
    found = (spans, max((where.end for where in spans), default=0))
    return _remember(_read_layouts, numbers, found) if len(numbers) <= _MAX_KEY else found


def _read_layout(layout: tuple[int, ...], size: int) -> tuple[TensorSpan, ...]:
    found: list[TensorSpan] = []
    at = 0
    while at < len(layout):
        dimensions = layout[at + 1] if at + 1 < len(layout) else 0
        if at + dimensions + 2 >= len(layout):
            raise ProtocolError(f"tensor {len(found)} of the payload is cut off within its layout")
        dtype = _TORCH_DTYPE.get(layout[at])
        if dtype is None:
            raise ProtocolError(f"tensor {len(found)} of the payload has unknown dtype {layout[at]}")
        shape = layout[at + 2 : at + 2 + dimensions]
        offset = layout[at + 2 + dimensions]
        count = math.prod(shape)
        # A tensor without elements still has strides, which must not overflow.
        bound = count or math.prod(extent or 1 for extent in shape)
        if dimensions > _MAX_DIMENSIONS or bound > _MAX_ELEMENTS:
            raise ProtocolError(
                f"tensor {len(found)} of the payload has shape {shape[:_MAX_DIMENSIONS]}: too large"
            )
        end = offset + count * dtype.itemsize
        if end > size:
            raise ProtocolError(
                f"tensor {len(found)} of the payload ends at byte {end}, but the payload has {size} bytes"
            )
        found.append(TensorSpan(dtype, shape, count, offset, end))
        at += dimensions + 3
    return tuple(found)


__all__ = [
    "ALIGNMENT",
    "MAX_MESSAGE",
    "Layout",
    "TensorSpan",
    "error_text",
    "layout",
    "read_reply",
    "read_request",
    "reply_text",
    "request_text",
    "require_fit",
    "varint",
]
