"""All kinds of channels behave alike: order, errors, deadlines, peers that die, no leak."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from channels import choose, local
from channels.base import Channel, Phase, Request, RequestId, Server
from channels.collective import channel as collective
from channels.cuda import channel as cuda
from channels.framing import header as headers
from channels.framing.message_socket import Head, MessageSocket
from channels.grpc import channel as grpc
from channels.shm import channel as shm
from errors import (
    ChannelError,
    ChannelTimeout,
    ConfigError,
    ProtocolError,
    RemoteError,
    StaleEpoch,
)
from support import gloo_group
from support.fakes.device_memory import PretendedMemory

SERVE: dict[str, Callable[[Any], Server]] = {
    "local": local.serve,
    "shm": shm.serve,
    "collective": collective.serve,
    "grpc": grpc.serve,
    "cuda": partial(cuda.CudaServer, memory=PretendedMemory(), place="here"),
    "nccl": gloo_group.serve,
}


CONNECT: dict[str, Callable[[str], Channel]] = {
    "cuda": partial(cuda.open_channel, memory=PretendedMemory(), here="here"),
    "nccl": gloo_group.connect,
}


WIRES = ["shm", "collective", "grpc", "cuda", "nccl"]


def request(*tensors: torch.Tensor, step: int = 0, run: str = "echo") -> Request:
    id = RequestId(run=run, epoch=0, step=step, microbatch=0, layer=0, phase=Phase.INFER, router="test")
    return Request(id=id, tensors=tensors)


def handle(given: Request) -> tuple[torch.Tensor, ...]:
    """A handler that does what the request's run names."""
    if given.id.run == "stale":
        raise StaleEpoch("the table is of epoch 5", epoch=5)
    if given.id.run == "refuse":
        raise ProtocolError("no such expert")
    if given.id.run == "fail":
        raise ValueError("by mistake")
    if given.id.run == "hang":
        threading.Event().wait(60)
    return (torch.tensor([given.id.step]), *(tensor * 2 for tensor in given.tensors))


@pytest.fixture(params=list(SERVE))
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    server = SERVE[request.param](handle)
    opened = CONNECT.get(request.param, choose.connect)(server.address)
    yield opened
    opened.close()
    server.close()


def test_replies_come_in_the_order_of_the_requests(channel: Channel) -> None:
    tickets = [channel.submit(request(torch.full((4, 3), float(i)), step=i)) for i in range(100)]
    for i, ticket in enumerate(tickets):
        step, doubled = ticket.result(30)
        assert int(step) == i
        assert torch.equal(doubled, torch.full((4, 3), 2.0 * i))


@pytest.mark.parametrize("rows", [0, 1, 17, 4096])
def test_payloads_of_any_size(channel: Channel, rows: int) -> None:
    given = torch.randn(rows, 256)
    for _ in range(3):
        _, doubled = channel.submit(request(given)).result(30)
        assert torch.equal(doubled, given * 2)


def test_results_stay_the_callers(channel: Channel) -> None:
    """The memory of a reply is not reused while one of its tensors is alive."""
    kept = [channel.submit(request(torch.full((512, 256), float(i)))).result(30)[1] for i in range(20)]
    for i, tensor in enumerate(kept):
        assert bool((tensor == 2.0 * i).all())
        tensor.add_(1.0)


def test_errors_reach_the_caller_and_the_channel_goes_on(channel: Channel) -> None:
    with pytest.raises(StaleEpoch) as stale:
        channel.submit(request(run="stale")).result(30)
    assert stale.value.epoch == 5
    with pytest.raises(RemoteError, match="no such expert"):
        channel.submit(request(run="refuse")).result(30)
    with pytest.raises(RemoteError, match="ValueError: by mistake"):
        channel.submit(request(run="fail")).result(30)
    assert int(channel.submit(request(step=4)).result(30)[0]) == 4


def test_a_closed_channel_refuses(channel: Channel) -> None:
    channel.close()
    channel.close()
    with pytest.raises(ChannelError):
        channel.submit(request()).result(30)


def _serve_in_child(kind: str, pipe: Any) -> None:
    server = SERVE[kind](handle)
    pipe.send(server.address)
    pipe.recv()


@pytest.fixture(params=WIRES)
def remote(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Channel]]:
    """A server in a process of its own, and a channel to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_in_child, args=(request.param, there), daemon=True)
    process.start()
    assert here.poll(60)
    opened = CONNECT.get(request.param, choose.connect)(here.recv())
    yield process, opened
    opened.close()
    process.kill()
    process.join()


def test_a_killed_server_is_an_error_at_once(remote: tuple[Any, Channel]) -> None:
    process, opened = remote
    assert int(opened.submit(request(step=1)).result(30)[0]) == 1
    waiting = opened.submit(request(run="hang"))
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ChannelError):
        waiting.result(30)
    with pytest.raises(ChannelError):
        opened.submit(request()).result(30)


def test_a_late_reply_closes_the_channel(remote: tuple[Any, Channel]) -> None:
    _, opened = remote
    with pytest.raises(ChannelTimeout):
        opened.submit(request(run="hang")).result(0.2)
    with pytest.raises(ChannelError):
        opened.submit(request()).result(30)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", WIRES)
def test_close_leaves_no_thread_and_no_descriptor(kind: str) -> None:
    def once() -> None:
        server = SERVE[kind](handle)
        channels = [CONNECT.get(kind, choose.connect)(server.address) for _ in range(3)]
        for opened in channels:
            opened.submit(request(torch.ones(300, 300))).result(30)
        for opened in channels[:2]:  # the server closes the third
            opened.close()
        server.close()
        channels[2].close()

    once()  # files that a first use opens for good, such as gRPC's pollers
    threads, files = set(threading.enumerate()), _open_files()
    for _ in range(5):
        once()
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)  # gRPC's threads end later; ours have been joined by close
        assert not thread.is_alive(), thread.name
    assert _open_files() <= files + 2  # gRPC closes its sockets later
    assert not [name for name in os.listdir("/dev/shm") if "raymoe" in name]


def test_garbage_on_the_doorbell_ends_that_connection_alone() -> None:
    server = shm.serve(handle)
    good = choose.connect(server.address)
    name = server.address.rpartition("/")[2]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as bad:
        bad.settimeout(30)
        bad.connect("\0" + name)
        bad.send(os.urandom(200))
        assert bad.recv(1) == b""
    assert int(good.submit(request(step=2)).result(30)[0]) == 2
    good.close()
    server.close()


def test_nobody_listening_is_said() -> None:
    server = shm.serve(handle)
    server.close()
    with pytest.raises(ChannelError, match="no process listens"):
        choose.connect(server.address)
    with pytest.raises(ChannelError, match="no process listens at grpc:"):
        choose.connect("grpc:127.0.0.1:1", timeout=60.0)
    with socket.socket() as deaf:  # accepts connections and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(ChannelTimeout, match=r"within 0\.3 s"):
            choose.connect(f"grpc:127.0.0.1:{deaf.getsockname()[1]}", timeout=0.3)
    with pytest.raises(ConfigError, match="unknown kind"):
        choose.connect("pigeon:roof")


def test_the_status_names_what_callers_take() -> None:
    addresses = {kind: f"{kind}:x" for kind in ("local", "shm", "collective", "grpc")}
    assert choose.taken("auto", addresses) == "shm/grpc"
    assert choose.taken("auto", {"grpc": "grpc:x"}) == "grpc"
    assert choose.taken("collective", addresses) == "collective"
    assert choose.taken("collective", {"grpc": "grpc:x"}) == choose.taken("auto", {}) == "none"


def test_memory_of_a_collective_channel_is_used_again() -> None:
    server = collective.serve(handle)
    channel = choose.connect(server.address)
    assert isinstance(channel, collective.CollectiveChannel)
    rows = channel._end._rows
    seen = set()
    for i in range(40):
        given = torch.full((300 + i, 256), float(i))
        _, doubled = channel.submit(request(given)).result(30)
        assert torch.equal(doubled, given * 2)
        assert len(rows._leaving) <= 1  # the reply says that the request has come
        seen.add(doubled.data_ptr() & ~63)
        del doubled
    assert len(seen) <= 6  # of two sizes of memory, each asked for in advance
    channel.close()
    server.close()


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::1]:0"])
def test_a_collective_channel_talks_over_the_interface_that_it_came_by(bind: str) -> None:
    if "::1" in bind:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6 ({error}); it runs where there is one")
    server = collective.serve(handle, bind=bind)
    channel = choose.connect(server.address.replace("0.0.0.0", "127.0.0.1"))
    given = torch.randn(300, 256)
    assert torch.equal(channel.submit(request(given)).result(30)[1], given * 2)
    channel.close()
    server.close()


def test_a_group_is_not_told_more_than_it_takes() -> None:
    server = collective.serve(handle)
    host, _, port = server.address.removeprefix("collective:").rpartition(":")
    with socket.create_connection((host, int(port)), 30) as bad:
        line = MessageSocket(bad, "the server")
        with pytest.raises(ChannelError):
            for at in range(100_000):
                line.write(Head(b"key %d" % at, 1 << 14, bytes(1 << 14)))
    server.close()


def test_a_channel_closed_while_rows_are_awaited_is_a_channel_error() -> None:
    server = collective.serve(handle)
    channel = choose.connect(server.address)
    assert isinstance(channel, collective.CollectiveChannel)
    channel.submit(request(torch.ones(300, 256))).result(30)
    rows = channel._end._rows
    channel.close()
    with pytest.raises(ChannelError, match="was closed"):
        rows.receive([headers.layout((torch.empty(1 << 16),)).spans[0]] * 2, None)
    server.close()


def test_tensors_that_overlap_are_none_of_ours() -> None:
    """A peer that names the same bytes a thousand times gets no memory for each of them."""
    server = collective.serve(handle)
    bad = choose.connect(server.address)
    assert isinstance(bad, collective.CollectiveChannel)
    one = headers.layout((torch.empty(1 << 16),))
    text = headers.request_text(request().id, one) + one.text  # which protobuf reads as two of them
    bad._end._socket.write(Head(text, one.size))
    with pytest.raises(ChannelError):
        bad._end.head(time.monotonic() + 30)
    bad.close()
    good = choose.connect(server.address)
    assert int(good.submit(request(step=2)).result(30)[0]) == 2
    good.close()
    server.close()
