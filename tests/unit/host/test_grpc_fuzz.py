"""Malformed bytes at a host's gRPC port end their own call; the host goes on and its memory stays."""

from __future__ import annotations

import gc
import logging
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc as grpc_library
import psutil
import pytest
import torch

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.host.host_server import ExpertHostServer
from actors.rpc.host_client import HostClient
from channels import choose
from channels.base import Phase, Request, RequestId
from channels.framing import frame_codec
from channels.grpc import channel as grpc
from channels.grpc import tls
from jobs.tools.certs import make_certificates
from protos import expert_pb2
from support.tiny_cluster import CONFIG, LAYERS, SeededSource

MIB = 1 << 20
# Not Retain: among thousands of calls one would be a valid order to use another epoch.
UNARY = ("Prepare", "Seal", "Commit", "Assemble", "Snapshot", "Inventory", "Ping", "Status")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def request() -> Request:
    rows = torch.randn(3, CONFIG.hidden_size, dtype=torch.float64)
    pointer, expert, gate = torch.arange(4).int(), torch.zeros(3).int(), torch.ones(3).double()
    id = RequestId("run", 0, 0, 0, LAYERS[0], Phase.INFER, "fuzz")
    return Request(id, (rows, pointer, expert, gate))


def mutated(source: random.Random, frame: bytes) -> bytes:
    """A frame with some bytes changed, removed or inserted."""
    found = bytearray(frame)
    for _ in range(source.randint(1, 8)):
        at = source.randrange(len(found) + 1)
        kind = source.randrange(3)
        if kind == 0 and at < len(found):
            found[at] = source.randrange(256)
        elif kind == 1:
            del found[at : at + source.randint(1, 40)]
        else:
            found[at:at] = source.randbytes(source.randint(1, 40))
    return bytes(found)


class Attacker:
    """Sends malformed bytes of several kinds to one address."""

    def __init__(self, address: str, seed: int) -> None:
        self.source = random.Random(seed)
        self.target = address.removeprefix("grpc:")
        self.channel = tls.dial(self.target, grpc.OPTIONS)
        self.frame = frame_codec.encode_request(request())
        self.order = expert_pb2.AssembleRequest(
            epoch=3, experts=[expert_pb2.LayerExperts(layer=LAYERS[0], experts=[0, 1])], base=0, step=0
        ).SerializeToString()

    def one(self) -> None:
        """Send one malformed call and read the reply."""
        source = self.source
        kind = source.randrange(4)
        with suppress(grpc_library.RpcError, OSError):
            if kind == 0:
                host, _, port = self.target.rpartition(":")
                with socket.create_connection((host, int(port)), timeout=20) as peer:
                    peer.sendall(source.choice((b"", PREFACE)) + source.randbytes(source.randint(1, 300)))
                    peer.shutdown(socket.SHUT_WR)
                    while peer.recv(1 << 16):
                        continue
            elif kind == 1:
                exchange = self.channel.stream_stream(f"/{grpc.SERVICE}/{grpc.METHOD}", None, None)
                list(exchange(iter([mutated(source, self.frame)]), timeout=20))
            elif kind == 2:
                call = self.channel.unary_unary(f"/{grpc.SERVICE}/{source.choice(UNARY)}", None, None)
                ordered = source.random() < 0.5
                call(mutated(source, self.order) if ordered else source.randbytes(30), timeout=20)
            else:
                put = self.channel.stream_unary(f"/{grpc.SERVICE}/Put", None, None)
                put(iter([source.randbytes(40), mutated(source, self.frame)]), timeout=20)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Keep pytest from recording log records, whose tracebacks would hold memory."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_malformed_frames(count: int, secured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if secured:
        make_certificates(tmp_path / "tls", days=1, ca_days=1)
        monkeypatch.setenv(tls.VARIABLE, str(tmp_path / "tls"))
    initial = InitialExperts(source=SeededSource(), experts={LAYERS[0]: (0,)})
    host = ExpertHost("host-0", CONFIG, initial, settings=HostSettings(dtype=torch.float64))
    server = ExpertHostServer(host)
    good, client = choose.connect(server.info.addresses["grpc"]), HostClient(server.info, timeout=20)
    asked = request()
    (before,) = good.submit(asked).result(20)
    attacker = Attacker(server.info.addresses["grpc"], seed=count)
    memory = []
    for at in range(count):
        attacker.one()
        if at in (count // 5, count - 1):
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    attacker.channel.close()
    client.ping(20)
    (after,) = good.submit(asked).result(20)
    assert torch.equal(after, before)
    assert host.stats().kept == 0 and host.stats().in_flight == 0
    good.close()
    client.close()
    server.close()
    print(f"{count} malformed: {(memory[1] - memory[0]) / MIB:+.1f} MiB of {memory[0] / MIB:.0f}")
    assert memory[1] - memory[0] < 16 * MIB
