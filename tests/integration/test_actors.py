"""Expert hosts, coordinator and a stand-alone router as Ray actors, called from this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest
import ray
import torch
from torch import Tensor

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.training_steps import Beginning, TrainingSteps
from actors.coordinator.transfer_plan import PlacementSpec
from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.messages import control_codec as wire
from actors.messages.steps import OptimizerSettings, StepReport, TrainingPlan
from actors.remote import CoordinatorActor, ExpertHostActor, RouterActor, ask, start
from actors.router import Router, RouterSettings
from actors.router.gate_router import GateRouter, gates_of
from actors.rpc.coordinator_client import CoordinatorClient
from actors.rpc.host_client import HostClient
from channels.base import Channel
from channels.choose import reach
from cluster.placement import plan_placement
from cluster.topology import HostInfo, RoutingTable
from errors import ChannelError, ChannelTimeout, CheckpointError, Interrupted, RaymoeError, ResourceError
from model.checkpoints.sources import RandomSource
from model.config import ModelConfig
from model.experts.local import LocalExperts
from model.routing import affinity, gate_values, select_experts

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    initializer_range=0.2,
)
LAYERS = CONFIG.moe_layers
SETTINGS = OptimizerSettings()
pytestmark = [pytest.mark.shares("ray"), pytest.mark.usefixtures("ray_cluster")]
PLAN = TrainingPlan(steps=4, workers=1, learning_rate=1e-2, clip_norm=0.5)
EXACT = {"rtol": 0.0, "atol": 1e-12}
PATIENCE = 120.0


def source() -> RandomSource:
    return RandomSource(CONFIG, 7, torch.float64)


def build_host(index: int) -> ExpertHost:
    return ExpertHost(
        f"host-{index}",
        CONFIG,
        InitialExperts(source=source()),
        settings=HostSettings(optimizer=SETTINGS, dtype=torch.float64, threads=1),
        resources=HostResources(open_source=lambda _: source()),
    )


def build_coordinator() -> Coordinator:
    bias = torch.zeros(len(LAYERS), CONFIG.n_routed_experts)

    def steps(placements: PlacementController) -> TrainingSteps:
        beginning = Beginning(directory="", step=0, moments=False, bias=bias)
        return TrainingSteps(PLAN, tuple(bias.shape), placements, beginning=lambda: beginning)  # type: ignore[arg-type]

    return Coordinator(
        PlacementSpec(layers=LAYERS, n_experts=CONFIG.n_routed_experts, n_group=CONFIG.n_group),
        HostPolicy(hosts=2),
        control=partial(HostClient, timeout=60.0),
        initial=InitialWeights(step=0),
        steps=steps,
    )


def build_router(table: RoutingTable) -> GateRouter:
    router = Router(
        "router-0", "run", CONFIG, table, lambda host: open_channel(host, "auto"), RouterSettings(lanes=2)
    )
    return GateRouter(CONFIG, gates_of(CONFIG, source().trunk()), router, lanes=2)


def broken_build() -> ExpertHost:
    raise CheckpointError("no such checkpoint: /nowhere")


def dying_build() -> ExpertHost:
    os._exit(3)


def open_channel(host: HostInfo, kind: str) -> Channel:
    return reach(kind, host.addresses, timeout=5.0, device=torch.device("cpu"))


class Hosts:
    """Expert host actors with experts, their coordinator, and the routing table."""

    def __init__(self, n: int) -> None:
        self.actors = [start(ExpertHostActor, partial(build_host, index)) for index in range(n)]
        self.infos = tuple(
            ask(actor.info.remote(), what=f"expert host {index}", timeout=PATIENCE)
            for index, actor in enumerate(self.actors)
        )
        self.coordinator_actor = start(CoordinatorActor, build_coordinator)
        address = ask(self.coordinator_actor.address.remote(), what="the coordinator", timeout=PATIENCE)
        self.coordinator = CoordinatorClient(address)
        for info in self.infos:
            self.coordinator.register_host(info)
        self.coordinator.place_experts()
        self.table = self.coordinator.table()

    def close(self) -> None:
        self.coordinator.close()
        for actor in (*self.actors, self.coordinator_actor):
            ray.kill(actor)


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    hosts = Hosts(request.param)
    yield hosts
    hosts.close()


def local_experts() -> LocalExperts:
    experts = LocalExperts(
        LAYERS,
        n_experts=CONFIG.n_routed_experts,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.moe_intermediate_size,
        dtype=torch.float64,
    )
    weights = source()
    with torch.no_grad():
        for layer in LAYERS:
            w13, w2 = experts.weights(layer)
            for expert in range(CONFIG.n_routed_experts):
                w13[expert], w2[expert] = weights.expert(layer, expert)
    return experts


def tokens(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    gates, idx = torch.rand(n, 8, generator=generator, dtype=torch.float64).topk(3)
    return rows.requires_grad_(), idx, gates.clone().requires_grad_()


def through(experts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of two layers with a shared path."""
    rows, idx, gates = tokens(50)
    out = rows
    for layer in LAYERS:
        pending = experts.dispatch(layer, out, idx, gates)
        shared = torch.tanh(out)
        out = pending.combine() + shared
    out.square().sum().backward()
    assert rows.grad is not None
    assert gates.grad is not None
    return out.detach(), rows.grad, gates.grad


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_both_channels_equal_local_experts_and_a_commit_equals_adamw(hosts: Hosts) -> None:
    oracle = local_experts()
    expected = through(oracle)
    for microbatch, kind in enumerate(("shm", "grpc")):
        router = Router("worker-0", "run", CONFIG, hosts.table, lambda h, kind=kind: open_channel(h, kind))
        lane = router.lane(0)
        lane.begin(0, microbatch)
        for got, wanted in zip(through(lane), expected, strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)
        assert router.counters().tokens == 100
        assert router.counters().rows <= 2 * router.counters().tokens
        router.close()
    through(oracle)  # the hosts have seen the rows twice
    squared = sum(float(p.grad.square().sum()) for p in oracle.parameters() if p.grad is not None)
    coordinator = hosts.coordinator
    holders = plan_placement(len(LAYERS), CONFIG.n_routed_experts, CONFIG.n_group, 2)
    assert (hosts.table.hosts, hosts.table.holders) == (hosts.infos, holders)
    assert coordinator.join(0, 1, -1, "").step == 0
    loads = torch.arange(len(LAYERS) * 8).reshape(len(LAYERS), 8)
    report = StepReport(worker=0, step=0, loads=loads, trunk_squared_norm=1.0)
    decision = coordinator.report(report)
    assert decision.grad_norm == pytest.approx((squared + 1.0) ** 0.5, rel=1e-12)
    assert coordinator.report(report).grad_norm == decision.grad_norm
    optimizer = torch.optim.AdamW(
        oracle.parameters(),
        lr=decision.learning_rate,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        weight_decay=SETTINGS.weight_decay,
    )
    for parameter in oracle.parameters():
        assert parameter.grad is not None
        parameter.grad *= decision.scale
    optimizer.step()
    optimizer.zero_grad()
    router = Router("worker-0", "run", CONFIG, hosts.table, lambda h: open_channel(h, "auto"))
    router.lane(0).begin(1, 0)
    for got, wanted in zip(through(router.lane(0)), through(oracle), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    stats = [HostClient(info, timeout=60.0).stats() for info in hosts.infos]
    assert [one.step for one in stats] == [1, 1]
    assert [one.kept for one in stats] == [0, 0]
    router.close()


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_killed_host_is_an_error_at_once(hosts: Hosts) -> None:
    rows, idx, gates = tokens(50)
    waiting = []
    for kind in ("shm", "grpc"):
        router = Router(
            kind,
            "run",
            CONFIG,
            hosts.table,
            lambda h, k=kind: open_channel(h, k),
            RouterSettings(timeout=600.0),
        )
        router.lane(0).begin(0, 0)
        waiting.append((router, router.lane(0).dispatch(LAYERS[0], rows, idx, gates).combine()))
    coordinator = hosts.coordinator
    assert coordinator.join(0, 1, -1, "").attempt == 0
    os.kill(hosts.infos[1].pid, signal.SIGKILL)
    for router, out in waiting:
        lane = router.lane(0)
        with pytest.raises(ChannelError, match="expert host host-1") as caught:
            out.sum().backward()
        assert not isinstance(caught.value, ChannelTimeout)
        lane.abandon()
        with pytest.raises(ChannelError, match="expert host host-1"):
            lane.dispatch(LAYERS[0], rows, idx, gates).combine()
        lane.abandon()
        router.close()
    report = StepReport(worker=0, step=0, loads=torch.zeros(len(LAYERS), 8, dtype=torch.int64))
    with pytest.raises(Interrupted):  # the host is lost, or all have rolled back since
        coordinator.report(report)
    resume = coordinator.join(0, 1, 0, "host-1 is gone")
    assert (resume.attempt, resume.step) == (1, 0)
    table = coordinator.table()
    assert table.hosts == hosts.infos[:1]
    assert all(holders == (0,) for row in table.holders for holders in row)
    assert HostClient(hosts.infos[0], timeout=60.0).stats().kept == 0


@pytest.mark.parametrize("hosts", [1], indirect=True)
def test_a_router_actor_serves_layers(hosts: Hosts) -> None:
    from protos import router_pb2, router_pb2_grpc

    actor = start(RouterActor, partial(build_router, hosts.table))
    address = ask(actor.address.remote(), what="the router", timeout=PATIENCE)
    hidden = tokens(9)[0].detach()
    weight, bias = gates_of(CONFIG, source().trunk())[LAYERS[1]]
    scores = affinity(hidden, weight)
    idx = select_experts(scores, bias, top_k=3, n_group=4, topk_group=2)
    gates = gate_values(scores, idx, normalize=True, factor=CONFIG.routed_scaling_factor)
    expected = local_experts().dispatch(LAYERS[1], hidden, idx, gates).combine().detach()
    request = router_pb2.RouteRequest(id=5, layer=LAYERS[1], hidden=wire.tensor_to(hidden))

    def call(_: int) -> Tensor:
        with grpc.insecure_channel(address.removeprefix("grpc:")) as channel:
            (reply,) = router_pb2_grpc.RouterStub(channel).Route(iter([request]))
            assert reply.id == 5
            return wire.tensor_from(reply.output)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(call, range(4)):
            torch.testing.assert_close(got, expected, **EXACT)
    ray.kill(actor)


def test_errors_of_a_start_come_back_in_one_line() -> None:
    failing = start(ExpertHostActor, broken_build)
    with pytest.raises(CheckpointError) as refused:
        ask(failing.info.remote(), what="expert host 0", timeout=PATIENCE)
    assert str(refused.value) == "no such checkpoint: /nowhere"
    dying = start(ExpertHostActor, dying_build)
    with pytest.raises(RaymoeError, match="expert host 1 died: ") as died:
        ask(dying.info.remote(), what="expert host 1", timeout=PATIENCE)
    assert "\n" not in str(died.value)


def test_an_actor_that_finds_no_place_is_a_resource_error() -> None:
    actor = start(ExpertHostActor, partial(build_host, 0), cpus=1000)
    with pytest.raises(ResourceError, match="expert host 0 did not answer within 1 s"):
        ask(actor.info.remote(), what="expert host 0", timeout=1.0)
    ray.kill(actor)
