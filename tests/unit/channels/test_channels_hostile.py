"""Peers that break the protocol lose their own connection, and no other connection ends."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc as grpc_library
import pytest
import torch

from channels import choose
from channels.base import Phase, Request, RequestId, Server
from channels.cuda import channel as cuda
from channels.cuda.cuda_end import TRIAL_BYTES
from channels.framing.ordered_channel import MAX_IN_FLIGHT
from channels.grpc import channel as grpc
from channels.shm import channel as shm
from channels.shm.segments import shm_pool
from errors import ChannelError, ProtocolError
from protos import expert_pb2, expert_pb2_grpc
from support.fakes.device_memory import PretendedMemory

NAME = RequestId(run="r", epoch=0, step=0, microbatch=0, layer=0, phase=Phase.INFER, router="test")


HEAD = struct.Struct("<4sIQQI")


CAPACITY = 1 << 16


def echo(request: Request) -> tuple[torch.Tensor, ...]:
    return request.tensors


def header(**placed: Any) -> bytes:
    message = expert_pb2.Header(id=expert_pb2.RequestId(run="r"))
    if placed:
        shape = placed.get("shape", [])
        message.layout.extend([placed.get("dtype", 1), len(shape), *shape, placed.get("offset", 0)])
    return message.SerializeToString()


def memory(size: int, *, sealed: bool) -> int:
    if sealed:
        _, _, descriptor = shm_pool().take(size - size // 4)
        assert descriptor is not None
        return descriptor
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.fixture
def server() -> Iterator[Server]:
    opened = shm.serve(echo)
    yield opened
    opened.close()


def refused(server: Server, packet: bytes, descriptors: list[int], *, greeting: bytes = b"") -> bool:
    """Send one packet by hand after a valid greeting; return whether the server closes the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(30)
        peer.connect("\0" + server.address.rpartition("/")[2])
        if greeting:
            peer.send(greeting)
            assert peer.recv(1 << 16)
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        peer.sendmsg([packet], rights)
        for descriptor in descriptors:
            os.close(descriptor)
        return peer.recv(1 << 16) == b""


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process, and the files that they refer to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def honest_size() -> int:
    _, _, descriptor = shm_pool().take(1024)
    assert descriptor is not None
    size = os.fstat(descriptor).st_size
    os.close(descriptor)
    return size


def test_an_honest_packet_by_hand_is_answered(server: Server) -> None:
    """Without this, the refusals below would prove nothing."""
    size = honest_size()
    packet = HEAD.pack(b"rmo1", 0, size, 1024, 0) + header(shape=[256])
    _, _, descriptor = shm_pool().take(1024)
    assert descriptor is not None
    assert not refused(server, packet, [descriptor])


@pytest.mark.parametrize(
    ("packet", "files"),
    [
        (b"x", []),
        (b"rmo0" + bytes(24), []),
        (HEAD.pack(b"rmo1", 0xFFFFFFFF, 0, 0, 0) + b"\xff\xff", []),
        (HEAD.pack(b"rmo1", 0xFFFFFFFF, 0, 0, 0), []),
        (HEAD.pack(b"rmo1", 0xFFFFFFFF, 0, 0, 2**31) + header(), []),
        (HEAD.pack(b"rmo1", 0xFFFFFFFF, 0, 0, 1) + bytes(4) + header(), []),
        (HEAD.pack(b"rmo1", 3, 0, 1024, 0) + header(shape=[256]), []),
        (HEAD.pack(b"rmo1", 0, CAPACITY, 1024, 0) + header(shape=[256]), []),
        (HEAD.pack(b"rmo1", 0, 0, 0, 0) + header(), [True]),
        (HEAD.pack(b"rmo1", 0, CAPACITY, 1024, 0) + header(shape=[256]), [False]),
        (HEAD.pack(b"rmo1", 0, 2**30, 1024, 0) + header(shape=[256]), [True]),
        (HEAD.pack(b"rmo1", 999, CAPACITY, 1024, 0) + header(shape=[256]), [True]),
        (HEAD.pack(b"rmo1", 0, CAPACITY, CAPACITY + 1, 0) + header(shape=[256]), [True]),
        (HEAD.pack(b"rmo1", 0, CAPACITY, 1024, 0) + header(shape=[257]), [True]),
        (HEAD.pack(b"rmo1", 0, CAPACITY, 1024, 0) + header(shape=[256], offset=4), [True]),
        (HEAD.pack(b"rmo1", 0, CAPACITY, 1024, 0) + header(shape=[256]), [True, True, True]),
        (bytes(70_000), []),
    ],
)
def test_a_packet_that_lies_closes_its_connection_alone(
    packet: bytes, files: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    before = open_files()
    server = shm.serve(echo)
    good = choose.connect(server.address)
    assert refused(server, packet, [memory(CAPACITY, sealed=sealed) for sealed in files])
    assert "closed the connection to pid" in caplog.text
    (back,) = good.submit(Request(id=NAME, tensors=(torch.ones(3),))).result(30)
    assert torch.equal(back, torch.ones(3))
    good.close()
    server.close()
    # What earlier tests left to the collector may be closed in the meantime.
    assert open_files() <= before


def test_a_process_of_another_user_is_refused_by_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server = shm.serve(echo)
    name = server.address.rpartition("/")[2]
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)  # to both ends, the other one is of another user
    try:
        with pytest.raises(ChannelError, match=f"runs as user {user}"):
            choose.connect(server.address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(30)
            stranger.connect("\0" + name)
            assert stranger.recv(1 << 16) == b""
    finally:
        server.close()


def test_a_stream_of_garbage_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.serve(echo)
    good = choose.connect(server.address)
    with grpc_library.insecure_channel(server.address.removeprefix("grpc:")) as channel:
        exchange = channel.stream_stream(f"/{grpc.SERVICE}/{grpc.METHOD}", None, None)
        with pytest.raises(grpc_library.RpcError) as refusal:
            list(exchange(iter([b"garbage"])))
        code: Any = refusal.value
        assert code.code() is grpc_library.StatusCode.INVALID_ARGUMENT
    assert "closed the connection to" in caplog.text
    (back,) = good.submit(Request(id=NAME, tensors=(torch.ones(3),))).result(30)
    assert torch.equal(back, torch.ones(3))
    good.close()
    server.close()


def test_generated_stubs_exchange_frames_and_control_calls_beside_them() -> None:
    class Servicer(expert_pb2_grpc.ExpertServicer):
        def Prepare(self, request: Any, context: Any) -> expert_pb2.PrepareReply:
            return expert_pb2.PrepareReply(squared_norm=2.0)

    def register(server: Any) -> None:
        expert_pb2_grpc.add_ExpertServicer_to_server(Servicer(), server)

    server = grpc.serve(echo, services=(register,))
    rows = torch.arange(4, dtype=torch.float32)
    frame = expert_pb2.Frame(payload=rows.numpy().tobytes())
    frame.header.id.run = "foreign"
    frame.header.layout.extend([1, 1, 4, 0])
    with grpc_library.insecure_channel(server.address.removeprefix("grpc:")) as channel:
        stub: Any = expert_pb2_grpc.ExpertStub(channel)
        assert stub.Prepare(expert_pb2.PrepareRequest(step=3)).squared_norm == 2.0
        (reply,) = stub.Exchange(iter([frame]))
    assert reply.header.status.code == expert_pb2.CODE_OK
    assert reply.payload == frame.payload
    server.close()


@pytest.mark.parametrize("serve", [shm.serve, grpc.serve])
def test_more_in_flight_than_the_pipe_holds(serve: Callable[..., Server]) -> None:
    server = serve(echo)
    channel = choose.connect(server.address)
    tickets = [
        channel.submit(Request(id=NAME, tensors=(torch.full((40_000,), float(i)),)))
        for i in range(2 * MAX_IN_FLIGHT)
    ]
    for i, ticket in reversed(list(enumerate(tickets))):
        assert float(ticket.result(30)[0][0]) == i
    channel.close()
    server.close()


def test_a_request_that_cannot_travel_leaves_the_channel_whole() -> None:
    server = shm.serve(echo)
    channel = choose.connect(server.address)
    with pytest.raises(ProtocolError, match=r"torch\.bool"):
        channel.submit(Request(id=NAME, tensors=(torch.zeros(2, dtype=torch.bool),)))
    assert float(channel.submit(Request(id=NAME, tensors=(torch.ones(1),))).result(30)[0]) == 1
    channel.close()
    server.close()


def test_a_server_that_closes_wakes_its_callers() -> None:
    server = shm.serve(echo)
    channel = choose.connect(server.address)
    server.close()
    with pytest.raises(ChannelError):
        channel.submit(Request(id=NAME)).result(30)


def test_a_write_that_fails_leaves_no_segment_behind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = choose.connect(server.address)
    (good,) = channel.submit(request(torch.ones(3))).result(30)
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            raise ProtocolError("cannot be written")

        patched.setattr("channels.shm.doorbell._write", fail)
        for size in (3, 1 << 20):
            for _ in range(300):
                with pytest.raises(ProtocolError, match="cannot be written"):
                    channel.submit(request(torch.ones(size)))
    (again,) = channel.submit(request(torch.full((3,), 2.0))).result(30)
    assert good.tolist() == [1.0] * 3
    assert again.tolist() == [2.0] * 3
    channel.close()


def test_an_interrupt_in_the_middle_of_a_request_closes_the_channel(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = choose.connect(server.address)
    assert isinstance(channel, shm.ShmChannel)
    send = channel._bell.send

    def interrupted(*arguments: Any) -> Any:
        send(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(channel._bell, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        channel.submit(request(torch.ones(3)))
    with pytest.raises(ChannelError, match="connect again"):
        channel.submit(request(torch.ones(3)))


def test_a_timeout_beyond_all_bounds_is_none(server: Server) -> None:
    channel = choose.connect(server.address)
    for seconds in (1e19, float("inf")):
        assert channel.submit(request(torch.ones(2))).result(seconds)[0].tolist() == [1.0, 1.0]
    channel.close()


def request(*tensors: torch.Tensor) -> Request:
    name = RequestId(run="r", epoch=0, step=0, microbatch=0, layer=0, phase=Phase.INFER, router="test")
    return Request(id=name, tensors=tensors)


NOTE = struct.Struct("<IQHHH")


TOO_LONG = expert_pb2.Header(status=expert_pb2.Status(), layout=[1, 1, 1 << 40, 0]).SerializeToString()


LAYOUT = expert_pb2.Header(status=expert_pb2.Status(), layout=[1, 1, 4, 0]).SerializeToString()


def note(
    number: int = 0,
    capacity: int = 0,
    handle: bytes = b"",
    done: int = 0,
    places: int = 1,
    text: bytes = LAYOUT,
) -> bytes:
    head = NOTE.pack(number, capacity, len(handle), done, places)
    return head + struct.pack(f"<{done}I{places}H", *range(done), *range(places)) + handle + text


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff" * 200,
        note(),  # of an unknown segment
        note(number=7),
        note(capacity=CAPACITY, handle=b"/etc/passwd"),
        note(capacity=CAPACITY, handle=b""),
        note(done=1),  # gives back a segment that it never had
        note(places=2),
        note(places=60000)[:9000],
        note(text=b"\xff\xff"),
        note(
            text=expert_pb2.Header(status=expert_pb2.Status(), layout=[1, 1, 1 << 40, 0]).SerializeToString()
        ),
    ],
)
@pytest.mark.parametrize("greets", [True, False])
def test_notes_that_lie(text: bytes, greets: bool) -> None:
    opened = cuda.CudaServer(echo, PretendedMemory(), "here")
    good = cuda.open_channel(opened.address, PretendedMemory(), "here")
    begin = HEAD.pack(b"rmo1", 0xFFFFFFFD, 0, 0, 0)
    greeting = begin + PretendedMemory().make(TRIAL_BYTES)[1] if greets else b""
    try:
        assert refused(opened, begin + text, [], greeting=greeting)
        (reply,) = good.submit(Request(NAME, (torch.ones(3),))).result(30)
        assert torch.equal(reply, torch.ones(3))
    finally:
        good.close()
        opened.close()


def test_a_note_on_shared_memory_alone_is_refused(server: Server) -> None:
    assert refused(server, HEAD.pack(b"rmo1", 0xFFFFFFFD, 0, 0, 0) + note(), [])
