"""Headers: what a payload means, who calls, and how a call went.

A header is the protobuf message `raymoe.v1.Header` on every kind of wire; where the payload's bytes
lie is the wire's own business. Everything read from a peer is checked here against the payload's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

import torch
from google.protobuf.message import DecodeError

from channels.base import Phase, Request, RequestId
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


class Placement(NamedTuple):
    """Where a tensor lies within a payload; `shape` as torch has it, `offset` and `end` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    elements: int
    offset: int
    end: int


def request_header(request: Request) -> expert_pb2.Header:
    """A header with the request's id; its tensors are added by `place`.

    Raises:
        ProtocolError: a field of the id does not fit the wire (int64, text).
    """
    name = request.id
    try:
        return expert_pb2.Header(
            id=expert_pb2.RequestId(
                run=name.run,
                epoch=name.epoch,
                step=name.step,
                microbatch=name.microbatch,
                layer=name.layer,
                phase=int(name.phase),  # type: ignore[arg-type]  # an int is what protobuf wants
                router=name.router,
            )
        )
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name} does not fit the wire: {error}") from error


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_MAX_REMEMBERED: Final = 4096


class _Plan(NamedTuple):
    """The places of tensors of some dtypes and shapes, as numbers on the wire, and the payload's size."""

    placed: list[Placement]
    layout: list[int]
    size: int


_plans: dict[tuple[tuple[torch.dtype, torch.Size], ...], _Plan] = {}
_layouts: dict[tuple[int, ...], tuple[list[Placement], int]] = {}


def place(header: expert_pb2.Header, tensors: Sequence[torch.Tensor]) -> tuple[list[Placement], int]:
    """Lay `tensors` out one after the other, aligned, note it in `header`; returns it and the size.

    Raises:
        ProtocolError: a dtype that the wire does not know.
    """
    kinds = tuple([(tensor.dtype, tensor.shape) for tensor in tensors])
    plan = _plans.get(kinds)
    if plan is None:
        plan = _remember(_plans, kinds, _plan(tensors))
    header.layout.extend(plan.layout)
    return plan.placed, plan.size


def _plan(tensors: Sequence[torch.Tensor]) -> _Plan:
    placed = []
    layout: list[int] = []
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
        placed.append(Placement(tensor.dtype, shape, count, offset, end))
        layout += (wire, len(shape), *shape, offset)
    return _Plan(placed, layout, end)


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Calls of one size follow one another, layer by layer: what was worked out once is kept, in bounds."""
    if len(known) >= _MAX_REMEMBERED:
        known.clear()
    known[key] = value
    return value


def parse(data: bytes | memoryview) -> expert_pb2.Header:
    """Read a header.

    Raises:
        ProtocolError: these bytes are none.
    """
    try:
        return expert_pb2.Header.FromString(bytes(data))
    except DecodeError as error:
        raise ProtocolError(f"a header of {len(data)} bytes cannot be read: {error}") from error


def placements(header: expert_pb2.Header, size: int) -> list[Placement]:
    """What `header` says of a payload of `size` bytes, checked.

    Raises:
        ProtocolError: an unknown dtype, an absurd shape, or bytes outside of the payload.
    """
    layout = tuple(header.layout)
    known = _layouts.get(layout)
    if known is not None and known[1] <= size:
        return known[0]
    found = _read_layout(layout, size)
    return _remember(_layouts, layout, (found, max((where.end for where in found), default=0)))[0]


def _read_layout(layout: tuple[int, ...], size: int) -> list[Placement]:
    found: list[Placement] = []
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
        # A tensor without elements has strides nevertheless, which must not overflow.
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
        found.append(Placement(dtype, shape, count, offset, end))
        at += dimensions + 3
    return found


def request_id(header: expert_pb2.Header) -> RequestId:
    """The id of a request's header.

    Raises:
        ProtocolError: there is none, or its phase is unknown.
    """
    if not header.HasField("id"):
        raise ProtocolError("a request's header has no id")
    wire = header.id
    phase = _PHASES.get(wire.phase)
    if phase is None:
        raise ProtocolError(
            f"a request has unknown phase {wire.phase}; this host knows 0 to {len(_PHASES) - 1}"
        )
    return RequestId(
        run=wire.run,
        epoch=wire.epoch,
        step=wire.step,
        microbatch=wire.microbatch,
        layer=wire.layer,
        phase=phase,
        router=wire.router,
    )


def reply_header() -> expert_pb2.Header:
    """The header of a reply that went well; its tensors are added by `place`."""
    return expert_pb2.Header(status=expert_pb2.Status())


def error_header(error: Exception) -> expert_pb2.Header:
    """The header of a reply that says how the call failed."""
    text = str(error)[:MAX_TEXT].encode("utf-8", "replace").decode()
    status = expert_pb2.Status(code=expert_pb2.CODE_FAILED, message=text, type=type(error).__name__)
    if isinstance(error, StaleEpoch):
        status.code, status.epoch = expert_pb2.CODE_STALE_EPOCH, error.epoch
    elif isinstance(error, RaymoeError):
        status.code = expert_pb2.CODE_REFUSED
    return expert_pb2.Header(status=status)


def remote_error(header: expert_pb2.Header) -> RemoteError | None:
    """The error that a reply tells of, or None when the call went well.

    Raises:
        ProtocolError: the header is not a reply's.
    """
    if not header.HasField("status"):
        raise ProtocolError("a reply's header has no status")
    status = header.status
    if status.code == expert_pb2.CODE_OK:
        return None
    if status.code == expert_pb2.CODE_STALE_EPOCH:
        return StaleEpoch(status.message, epoch=status.epoch)
    return RemoteError(f"{status.type or 'error'}: {status.message}")


__all__ = [
    "ALIGNMENT",
    "Placement",
    "error_header",
    "parse",
    "place",
    "placements",
    "remote_error",
    "reply_header",
    "request_header",
    "request_id",
]
