"""Frames: round trips, frames read and written by other code, malformed frames refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from channels.base import Phase, Request, RequestId
from channels.framing import frame_codec
from errors import ConfigError, ProtocolError, RemoteError, StaleEpoch
from protos import expert_pb2, tensor_pb2

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)


def request(*tensors: torch.Tensor, run: str = "run") -> Request:
    name = RequestId(
        run=run, epoch=-1, step=2**40, microbatch=3, layer=61, phase=Phase.BACKWARD, router="worker-0"
    )
    return Request(id=name, tensors=tensors)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


WIRE_DTYPE = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.float64: tensor_pb2.DTYPE_FLOAT64,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.float16: tensor_pb2.DTYPE_FLOAT16,
    torch.int32: tensor_pb2.DTYPE_INT32,
    torch.int64: tensor_pb2.DTYPE_INT64,
}


def offsets(header: expert_pb2.Header) -> list[int]:
    """Offsets of a header's tensors, read as expert.proto defines them."""
    layout, found = list(header.layout), []
    while layout:
        found.append(layout[2 + layout[1]])
        layout = layout[3 + layout[1] :]
    return found


@given(st.lists(tensors(), max_size=5), st.text(max_size=10))
@settings(max_examples=200, deadline=None)
def test_a_request_comes_out_as_it_went_in(items: list[torch.Tensor], run: str) -> None:
    sent = request(*items, run=run)
    got = frame_codec.decode_request(frame_codec.encode_request(sent))
    assert got.id == sent.id
    assert len(got.tensors) == len(items)
    assert all(map(same, got.tensors, items))


@given(st.lists(tensors(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_generated_code_reads_and_writes_frames(items: list[torch.Tensor]) -> None:
    message = expert_pb2.Frame.FromString(frame_codec.encode_request(request(*items)))
    assert message.header.id.layer == 61 and message.header.id.phase == expert_pb2.PHASE_BACKWARD
    for offset, item in zip(offsets(message.header), items, strict=True):
        raw = message.payload[offset : offset + item.numel() * item.element_size()]
        assert raw == item.reshape(-1).view(torch.uint8).numpy().tobytes()
    # Another client may lay its payload out differently: here without padding, at odd offsets.
    foreign = expert_pb2.Frame(header=message.header)
    del foreign.header.layout[:]
    payload = b"?"
    for item in items:
        dtype = WIRE_DTYPE[item.dtype]
        foreign.header.layout.extend([dtype, item.ndim, *item.shape, len(payload)])
        payload += item.reshape(-1).view(torch.uint8).numpy().tobytes()
    foreign.payload = payload
    got = frame_codec.decode_request(foreign.SerializeToString())
    assert all(map(same, got.tensors, items))


def test_tensors_are_views_of_the_frame_and_aligned() -> None:
    rows, index = torch.randn(64, 256), torch.arange(7, dtype=torch.int32)
    frame = frame_codec.encode_reply((index, rows))
    _, got = frame_codec.decode_reply(frame)
    _, again = frame_codec.decode_reply(frame)
    assert got.data_ptr() == again.data_ptr()
    message = expert_pb2.Frame.FromString(frame)
    assert all(offset % 64 == 0 for offset in offsets(message.header))
    assert frame.index(message.payload) % 64 == 0


def test_results_outlive_the_frame_and_can_be_written() -> None:
    (got,) = frame_codec.decode_reply(frame_codec.encode_reply((torch.zeros(1000),)))
    got += 1
    assert got.sum() == 1000


def test_other_layouts_of_memory_travel_by_value() -> None:
    rows = torch.randn(6, 8, requires_grad=True)
    got = frame_codec.decode_reply(frame_codec.encode_reply((rows.t(), rows[:, ::2], rows[2:3])))
    assert all(map(same, got, (rows.t(), rows[:, ::2], rows[2:3])))
    assert not any(item.requires_grad for item in got)


def test_errors_travel_as_status() -> None:
    with pytest.raises(StaleEpoch, match="table moved") as stale:
        frame_codec.decode_reply(frame_codec.encode_error(StaleEpoch("table moved", epoch=7)))
    assert stale.value.epoch == 7
    with pytest.raises(RemoteError, match="ConfigError: no such layer"):
        frame_codec.decode_reply(frame_codec.encode_error(ConfigError("no such layer")))
    with pytest.raises(RemoteError, match="ZeroDivisionError: by zero"):
        frame_codec.decode_reply(frame_codec.encode_error(ZeroDivisionError("by zero")))
    with pytest.raises(RemoteError, match="ValueError: bad \\?"):
        frame_codec.decode_reply(frame_codec.encode_error(ValueError("bad \ud800")))


def test_what_the_wire_cannot_carry_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"tensor 1 is torch\.bool; the wire carries float32"):
        frame_codec.encode_reply((torch.zeros(1), torch.zeros(1, dtype=torch.bool)))
    with pytest.raises(ProtocolError, match="does not fit the wire"):
        frame_codec.encode_request(request(run="\ud800"))


def frame_of(*layout: int, payload: bytes = b"") -> bytes:
    header = expert_pb2.Header(id=expert_pb2.RequestId(run="r"), layout=layout)
    return expert_pb2.Frame(header=header, payload=payload).SerializeToString()


F32 = tensor_pb2.DTYPE_FLOAT32


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "has no id"),
        (b"\x0a", "ends within a number, or has one of more than 64 bits"),
        (b"\x0a\x05abc", r"ends at byte 7, but the frame has 5"),
        (b"\x0a\x03abc", "cannot be read"),
        (b"\x7a" + b"\xff" * 10, "one of more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "field 1 of a frame has wire type 0"),
        (expert_pb2.Frame(header=expert_pb2.Header()).SerializeToString(), "has no id"),
        (frame_of(F32, 1, *[4], 0, payload=b"x" * 15), "ends at byte 16"),
        (frame_of(F32, 0, 2**64 - 1, payload=b"x" * 8), "ends at byte"),
        (frame_of(F32, 2, *[2**63, 2**63], 0), "too large"),
        (frame_of(F32, 2, *[2**63, 0], 0), "too large"),
        (frame_of(F32, 9, *[0] * 9, 0), "too large"),
        (frame_of(0, 1, *[1], 0, payload=b"x" * 8), "unknown dtype 0"),
        (frame_of(99, 1, *[1], 0, payload=b"x" * 8), "unknown dtype 99"),
        (frame_of(F32), "cut off"),
        (frame_of(F32, 1), "cut off"),
        (frame_of(F32, 2**63, 0), "cut off"),
        (b"\x0a\x04\x0a\x02\x30\x09", "unknown phase 9"),
    ],
)
def test_a_malformed_frame_is_refused(frame: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        frame_codec.decode_request(frame)


@given(st.binary(max_size=200))
@example(b"\x7a\x00")
@settings(max_examples=500, deadline=None)
def test_no_bytes_crash_the_decoder(frame: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        frame_codec.decode_request(frame)
    with contextlib.suppress(ProtocolError, RemoteError):
        frame_codec.decode_reply(frame)


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_no_flipped_byte_crashes_the_decoder(data: st.DataObject) -> None:
    whole = frame_codec.encode_request(request(torch.zeros(3, 5), torch.arange(4), torch.zeros(0, 2)))
    frame = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(1, 3)) if frame else 0):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = frame_codec.decode_request(bytes(frame))
    except ProtocolError:
        return
    for item in got.tensors:  # an accepted tensor lies within the frame, so it can be read
        item.double().sum()
