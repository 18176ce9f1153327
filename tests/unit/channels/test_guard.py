"""The peers and calls that our gRPC servers admit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from channels.grpc.guard import Guard, Rate
from protos import expert_pb2, expert_pb2_grpc


class RateClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_empties_and_fills() -> None:
    clock = RateClock()
    rate = Rate(per_second=2.0, burst=3.0, clock=clock)
    assert [rate.admits("a") for _ in range(4)] == [True, True, True, False]
    assert rate.admits("b")
    clock.now = 1.0
    assert [rate.admits("a") for _ in range(3)] == [True, True, False]
    clock.now = 100.0
    assert [rate.admits("a") for _ in range(4)] == [True, True, True, False]


def test_addresses_are_forgotten_in_time() -> None:
    rate = Rate(per_second=1.0, burst=1.0, clock=RateClock())
    assert all(rate.admits(str(i)) for i in range(10_000))
    assert len(rate._left) <= 4096


class Servicer(expert_pb2_grpc.ExpertServicer):
    def Ping(self, request: expert_pb2.PingRequest, context: grpc.ServicerContext) -> expert_pb2.PingReply:
        return expert_pb2.PingReply()

    def Put(
        self, request_iterator: Iterator[expert_pb2.Frame], context: grpc.ServicerContext
    ) -> expert_pb2.PutReply:
        for _ in request_iterator:
            continue
        return expert_pb2.PutReply()


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    guard = Guard(Rate(per_second=1e-9, burst=3.0))
    server = grpc.server(ThreadPoolExecutor(2), interceptors=(guard,))
    expert_pb2_grpc.add_ExpertServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None).wait()


def test_what_cannot_be_parsed_is_refused_and_the_next_call_served(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/raymoe.v1.Expert/Ping", None, None)(b"\xff\xff", timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError):
        channel.stream_unary("/raymoe.v1.Expert/Put", None, None)(iter([b"\xff\xff"]), timeout=20)
    expert_pb2_grpc.ExpertStub(channel).Ping(expert_pb2.PingRequest(), timeout=20)


def test_too_many_calls_are_refused(channel: grpc.Channel) -> None:
    stub = expert_pb2_grpc.ExpertStub(channel)
    for _ in range(3):
        stub.Ping(expert_pb2.PingRequest(), timeout=20)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Ping(expert_pb2.PingRequest(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_nothing_serves_is_unimplemented(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/raymoe.v1.Expert/Nothing", None, None)(b"", timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
