"""The control plane over real gRPC, within this process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import grpc
import pytest
import torch

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.servicer import AdminServicer, CoordinatorServicer
from actors.coordinator.training_steps import TrainingSteps
from actors.coordinator.transfer_plan import PlacementSpec
from actors.host.host_server import ExpertHostServer
from actors.messages import control_codec as wire
from actors.messages.steps import StepReport, TrainingPlan
from actors.router.gate_router import GateRouter
from actors.router.gate_servicer import RouterServicer
from actors.rpc.admin_client import AdminClient
from actors.rpc.control_server import ControlServer
from actors.rpc.coordinator_client import CoordinatorClient
from actors.rpc.host_client import HostClient
from channels.base import Phase, Request, RequestId
from channels.grpc import channel as grpc_channel
from cluster.events import Event
from errors import (
    ChannelError,
    CheckpointError,
    ConfigError,
    Interrupted,
    ProtocolError,
    RaymoeError,
    RemoteError,
    ResourceError,
    is_loss,
)
from model.routing import affinity, gate_values, select_experts
from protos import admin_pb2_grpc, coordinator_pb2_grpc, expert_pb2, router_pb2, router_pb2_grpc
from support.tiny_cluster import CONFIG, LAYERS, TinyCluster, local_experts, tokens
from support.waiting import wait_until

PLAN = TrainingPlan(steps=5, workers=2, learning_rate=1e-2)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve_coordinator(stack: ExitStack, *, train: bool = True) -> CoordinatorClient:
    """Serve a coordinator; return a client of it."""
    client = CoordinatorClient(coordinator_address(stack, train=train))
    stack.callback(client.close)
    return client


def coordinator_address(stack: ExitStack, *, train: bool) -> str:
    """Serve a coordinator; return its address."""

    def steps(placements: PlacementController) -> TrainingSteps:
        return TrainingSteps(PLAN, (len(LAYERS), CONFIG.n_routed_experts), placements)

    coordinator = Coordinator(
        PlacementSpec(layers=LAYERS, n_experts=CONFIG.n_routed_experts, n_group=CONFIG.n_group),
        HostPolicy(hosts=2),
        control=lambda info: HostClient(info, timeout=20),
        initial=InitialWeights(step=0 if train else None),
        steps=steps if train else None,
    )
    stack.callback(coordinator.close)

    def register(server: grpc.Server) -> None:
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorServicer(coordinator), server)
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(coordinator), server)

    server = ControlServer(register)
    stack.callback(server.close)
    return server.address


NAME = RequestId(run="r", epoch=0, step=0, microbatch=0, layer=0, phase=Phase.INFER, router="test")


def serve_hosts(stack: ExitStack, cluster: TinyCluster) -> list[ExpertHostServer]:
    servers = [ExpertHostServer(host, node="here") for host in cluster.hosts]
    for server in servers:
        stack.callback(server.close)
    return servers


def report(worker: int, step: int = 0) -> StepReport:
    loads = torch.arange(len(LAYERS) * 8).reshape(len(LAYERS), 8)
    return StepReport(worker=worker, step=step, loads=loads, main_sum=6.0, n_targets=2, tokens=3)


def test_a_step_over_grpc(stack: ExitStack) -> None:
    cluster = TinyCluster(2, empty=True)
    client = serve_coordinator(stack)
    with pytest.raises(Interrupted, match=r"the coordinator \(grpc:.*experts are without a host"):
        client.table()
    servers = serve_hosts(stack, cluster)
    for server in servers:
        client.register_host(server.info)
    client.place_experts()
    client.place_experts()
    assert [client.join(rank, 2, -1, "").step for rank in range(2)] == [0, 0]
    table = client.table()
    assert table.epoch == 0
    assert table.hosts == tuple(server.info for server in servers)
    assert table.holders == cluster.holders
    rows, idx, gates = tokens(6, grad=True)
    cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine().sum().backward()
    squared = sum(float(g.square().sum()) for host in cluster.hosts for g in host.gradients())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(client.report, (report(0), report(1)))
    assert first.grad_norm == second.grad_norm == pytest.approx(squared**0.5, rel=1e-12)
    assert torch.equal(first.bias, second.bias)
    assert first.bias.any()
    assert torch.equal(client.bias(), first.bias)
    assert client.metrics()[0].loss == 3.0
    assert client.failure is None
    with pytest.raises(ProtocolError, match="reports step 7, but the run is at step 1"):
        client.report(report(0, 7))
    assert client.request_stop() == 1
    stats = [HostClient(server.info, timeout=20).stats() for server in servers]
    assert [one.id for one in stats] == ["host-0", "host-1"]
    client.fail("worker 1 died")
    with pytest.raises(RaymoeError, match="worker 1 died"):
        client.report(report(0, 1))
    assert [host.step for host in cluster.hosts] == [1, 1]


def test_a_waiting_report_hears_of_a_failure(stack: ExitStack) -> None:
    client = serve_coordinator(stack)
    client.join(0, 2, -1, "")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.report, report(0))
        client.fail("worker 1 died")
        with pytest.raises(RaymoeError, match="worker 1 died"):
            waiting.result(20)


def test_host_errors_keep_their_class(stack: ExitStack) -> None:
    cluster = TinyCluster(1)
    (server,) = serve_hosts(stack, cluster)
    client = HostClient(server.info, timeout=20)
    stack.callback(client.close)
    with pytest.raises(ProtocolError, match=r"expert host host-0 \(grpc:.*at step 0, not at step 3"):
        client.prepare(3)
    assert client.prepare(0) == 0.0
    client.commit(0, 1e-2, 1.0)
    client.commit(0, 1e-2, 1.0)
    assert client.stats().step == 1
    server.close()
    with pytest.raises(ChannelError, match="expert host host-0"):
        client.stats()


def test_a_router_serves_layers_to_callers_outside(stack: ExitStack) -> None:
    cluster = TinyCluster(2, train=False)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(8, generator=generator)
    router = GateRouter(CONFIG, {LAYERS[0]: (weight, bias)}, cluster.router, lanes=1)
    server = ControlServer(lambda s: router_pb2_grpc.add_RouterServicer_to_server(RouterServicer(router), s))
    stack.callback(server.close)
    channel = stack.enter_context(grpc.insecure_channel(server.address.removeprefix("grpc:")))
    hidden = tokens(5)[0]
    requests = [
        router_pb2.RouteRequest(id=1, layer=LAYERS[0], hidden=wire.tensor_to(hidden)),
        router_pb2.RouteRequest(id=2, layer=0, hidden=wire.tensor_to(hidden)),
        router_pb2.RouteRequest(id=3, layer=LAYERS[0], hidden=wire.tensor_to(hidden[:, :3])),
        router_pb2.RouteRequest(id=4, layer=LAYERS[0], hidden=wire.tensor_to(hidden)),
    ]
    good, no_layer, narrow, again = router_pb2_grpc.RouterStub(channel).Route(iter(requests))
    scores = affinity(hidden, weight)
    idx = select_experts(scores, bias, top_k=3, n_group=4, topk_group=2)
    gates = gate_values(scores, idx, normalize=True, factor=CONFIG.routed_scaling_factor)
    expected = local_experts().dispatch(LAYERS[0], hidden, idx, gates).combine()
    for reply in (good, again):
        torch.testing.assert_close(wire.tensor_from(reply.output), expected.detach(), rtol=0, atol=1e-12)
        assert torch.equal(wire.tensor_from(reply.experts), idx)
    assert [reply.id for reply in (good, no_layer, narrow, again)] == [1, 2, 3, 4]
    assert no_layer.status.code == narrow.status.code == expert_pb2.CODE_REFUSED
    assert "layer 0 has no routed experts" in no_layer.status.message
    assert "[5, 3]" in narrow.status.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)])
def test_tensors_survive_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(100)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    back = wire.tensor_from(wire.tensor_to(tensor))
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_a_damaged_tensor_is_refused() -> None:
    message = wire.tensor_to(torch.ones(3))
    message.data = message.data[:-1]
    with pytest.raises(ProtocolError, match="11 bytes"):
        wire.tensor_from(message)
    message.dtype = 0  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="unknown type"):
        wire.tensor_from(message)


def test_an_error_class_of_ours_crosses_and_others_become_remote_errors(stack: ExitStack) -> None:
    cluster = TinyCluster(1)
    (server,) = serve_hosts(stack, cluster)
    client = HostClient(server.info, timeout=20)
    stack.callback(client.close)

    def raising(error: Exception) -> None:
        def save(directory: str, epoch: int | None = None) -> list[str]:
            raise error

        cluster.hosts[0].save = save  # type: ignore[method-assign]

    raising(CheckpointError("the disk is full"))
    with pytest.raises(CheckpointError, match="the disk is full"):
        client.save("d")
    raising(KeyError("what"))
    with pytest.raises(RaymoeError, match="KeyError: 'what'"):
        client.save("d")


def test_a_text_too_long_for_a_status_arrives_cut(stack: ExitStack) -> None:
    client = serve_coordinator(stack)
    client.fail("é\n" * 10_000)
    with pytest.raises(RaymoeError, match="é"):
        client.join(0, 2, -1, "")


def test_a_job_is_operated_over_grpc(stack: ExitStack) -> None:
    cluster = TinyCluster(3, train=False, empty=True)
    address = coordinator_address(stack, train=False)
    client = CoordinatorClient(address)
    stack.callback(client.close)
    servers = serve_hosts(stack, cluster)
    for server in servers[:2]:
        client.register_host(server.info)
    client.place_experts()
    admin = AdminClient(address)
    stack.callback(admin.close)
    status = admin.status()
    assert (status["mode"], status["wanted"], status["replicas_min"]) == ("serve", 2, 1)
    assert [(host["id"], host["state"], host["answers"]) for host in status["hosts"]] == [
        ("host-0", "serving", True),
        ("host-1", "serving", True),
    ]
    with pytest.raises(ConfigError, match="it takes 1 to 8"):
        admin.scale(9)
    assert admin.scale(3, timeout=0)["done"] is False
    with pytest.raises(ResourceError, match="is under way"):
        admin.drain("host-0")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(admin.scale, 3, timeout=20.0)
        assert admin.scale(4, timeout=0)["hosts"] == 4
        with pytest.raises(ResourceError, match=r"given up.*the change to 4 expert hosts takes its place"):
            waiting.result(20)
    orders, wanted, state = client.orders(starting=0, failed={}, stopped=[], lacking="no CPUs")
    assert (orders.start, orders.stop, wanted, state.wanted) == (2, (), 4, 4)
    assert admin.scale(3, timeout=0)["lacking"] == admin.status()["lacking"] == "no CPUs"
    orders, _, _ = client.orders(starting=2, failed={}, stopped=[])
    assert (orders.start, orders.cancel) == (0, 1)
    serial = client.table().serial
    client.register_host(servers[2].info)
    table = client.table_after(serial, None, 20.0)
    assert table is not None
    assert [host.id for host in table.hosts] == ["host-0", "host-1", "host-2"]
    wait_until(lambda: "scaled" in [event["kind"] for event in admin.status()["events"]])
    kinds = [event["kind"] for event in admin.events()]
    assert kinds.count("waiting") == kinds.count("scaled") == 1
    assert admin.events() == []
    assert admin.describe()["doing"] == "serves the weights "
    assert admin.drain("host-0", timeout=20.0)["done"] is True
    assert {event["kind"] for event in admin.events()} >= {"draining", "left"}
    noticed = {"at": 1767225600.25, "kind": "died", "text": "trunk replica a: its process ended"}
    for _ in range(2):  # the reply to the first one may have been lost
        client.record(Event(at=1767225600.25, kind="died", text="trunk replica a: its process ended"))
    assert [event for event in admin.events() if event["kind"] == "died"] == [noticed]
    assert [host.id for host in client.table().hosts] == ["host-1", "host-2"]
    orders, wanted, _ = client.orders(starting=0, failed={}, stopped=[])
    assert (orders.start, orders.stop, wanted) == (0, ("host-0",), 2)
    with pytest.raises(ProtocolError, match="has no training steps"):
        client.join(0, 1, -1, "")


def test_a_client_that_was_hung_up_is_a_channel_error(stack: ExitStack) -> None:
    (server,) = serve_hosts(stack, TinyCluster(1))
    client = HostClient(server.info, timeout=20)
    client.close()
    with pytest.raises(ChannelError, match="has been given up") as caught:
        client.stats()
    assert is_loss(caught.value)


def test_a_peer_that_is_gone_is_told_in_few_words() -> None:
    """Its name and address, and why, without gRPC's own list of attempts."""
    with ExitStack() as serving:
        (server,) = serve_hosts(serving, TinyCluster(1))
        info = server.info
    client = HostClient(info, timeout=20)
    with closing(client), pytest.raises(ChannelError) as caught:
        client.ping(20)
    at = info.addresses["grpc"].removeprefix("grpc:")
    assert str(caught.value) == f"expert host {info.id} (grpc:{at}) cannot be reached (Connection refused)"
    with pytest.raises(ChannelError) as caught:
        grpc_channel.connect(f"grpc:{at}")
    assert str(caught.value) == (
        f"no process listens at grpc:{at} (Connection refused); has its process ended?"
    )


def test_idle_streams_keep_no_control_call_away(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_channel, "MAX_STREAMS", 3)
    monkeypatch.setattr(grpc_channel, "MAX_CALLS", 1)
    (server,) = serve_hosts(stack, TinyCluster(1))
    address = server.info.addresses["grpc"]
    open_ = [grpc_channel.connect(address) for _ in range(3)]
    for channel in open_:
        stack.callback(channel.close)
        with pytest.raises(RemoteError):  # an answer: the stream is open
            channel.submit(Request(id=NAME, tensors=())).result(20)
    client = HostClient(server.info, timeout=20)
    stack.callback(client.close)
    client.ping(20)
    one_more = grpc_channel.connect(address)
    stack.callback(one_more.close)
    with pytest.raises(ChannelError, match="3 streams are open, and no more are taken"):
        one_more.submit(Request(id=NAME, tensors=())).result(20)
    client.ping(20)
