"""The frame of a byte stream: read and written without copies, valid protobuf, and never a crash."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from channels import codec
from channels.base import Phase, Request, RequestId
from errors import ProtocolError, RemoteError, StaleEpoch
from protos import expert_pb2

ID = RequestId(run="r", epoch=3, step=7, microbatch=1, layer=2, phase=Phase.FORWARD, router="worker-0")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (0, 7), (2, 3, 4)])
def test_tensors_come_back_as_they_went(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    first = (torch.rand(shape) * 100).to(dtype)
    second = torch.arange(5, dtype=torch.int64)
    request = codec.decode_request(codec.encode_request(Request(id=ID, tensors=(first, second))))
    assert request.id == ID
    assert request.tensors[0].dtype == dtype
    assert request.tensors[0].shape == first.shape
    assert torch.equal(request.tensors[0], first)
    assert torch.equal(request.tensors[1], second)


def test_strided_tensors_travel_by_value() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    (back,) = codec.decode_reply(codec.encode_reply((tensor,)))
    assert torch.equal(back, tensor)


def test_a_frame_is_the_protobuf_message_of_the_service() -> None:
    """A foreign client has nothing but the generated code."""
    tensor = torch.arange(6.0).view(2, 3)
    frame = expert_pb2.Frame.FromString(codec.encode_request(Request(id=ID, tensors=(tensor,))))
    assert frame.header.id.router == "worker-0"
    assert frame.payload == tensor.numpy().tobytes()
    request = codec.decode_request(frame.SerializeToString())
    assert torch.equal(request.tensors[0], tensor)


def test_errors_travel_with_class_and_text() -> None:
    with pytest.raises(StaleEpoch, match="fetch") as stale:
        codec.decode_reply(codec.encode_error(StaleEpoch("fetch the table", epoch=9)))
    assert stale.value.epoch == 9
    with pytest.raises(RemoteError, match="ProtocolError: no such expert"):
        codec.decode_reply(codec.encode_error(ProtocolError("no such expert")))
    with pytest.raises(RemoteError, match="KeyError"):
        codec.decode_reply(codec.encode_error(KeyError("x")))


def test_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        codec.encode_reply((torch.zeros(1, dtype=torch.complex64),))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    for decode in (codec.decode_request, codec.decode_reply):
        try:
            decode(data)
        except (ProtocolError, RemoteError):
            continue


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_frame_is_read_or_refused(data: st.DataObject) -> None:
    frame = bytearray(codec.encode_request(Request(id=ID, tensors=(torch.ones(4, 3), torch.ones(2)))))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    try:
        codec.decode_request(bytes(frame[:cut]))
    except ProtocolError:
        return
