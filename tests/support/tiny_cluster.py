"""A model of a few hundred weights and its expert hosts, in this process."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.messages.steps import OptimizerSettings
from actors.router import Router, RouterSettings
from actors.router.lane import Lane
from channels import local
from channels.base import Channel
from cluster.placement import plan_placement
from cluster.topology import HostInfo, RoutingTable, experts_held
from model.config import ModelConfig
from model.experts.local import LocalExperts

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=16,
    moe_intermediate_size=6,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
)
LAYERS = CONFIG.moe_layers
SETTINGS = OptimizerSettings(weight_decay=0.1)


class SeededSource:
    """A source of weights that depend on layer and expert alone."""

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * layer + expert)
        d, i = CONFIG.hidden_size, CONFIG.moe_intermediate_size
        return (
            torch.randn(2 * i, d, generator=generator, dtype=torch.float64) * 0.2,
            torch.randn(d, i, generator=generator, dtype=torch.float64) * 0.2,
        )

    def trunk(self) -> dict[str, Tensor]:
        return {}


def local_experts() -> LocalExperts:
    """The reference: all experts as parameters, in float64."""
    experts = LocalExperts(
        LAYERS,
        n_experts=CONFIG.n_routed_experts,
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.moe_intermediate_size,
        dtype=torch.float64,
    )
    source = SeededSource()
    with torch.no_grad():
        for layer in LAYERS:
            w13, w2 = experts.weights(layer)
            for expert in range(CONFIG.n_routed_experts):
                w13[expert], w2[expert] = source.expert(layer, expert)
    return experts


def tokens(n: int, seed: int = 0, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, D], idx [n, K] within any experts, gates [n, K]; float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, CONFIG.hidden_size, generator=generator, dtype=torch.float64)
    scores = torch.rand(n, CONFIG.n_routed_experts, generator=generator, dtype=torch.float64)
    gates, idx = scores.topk(CONFIG.num_experts_per_tok)
    return rows.requires_grad_(grad), idx, gates.clone().requires_grad_(grad)


class TinyCluster:
    """Hosts behind local channels, and a router to them; `empty` hosts wait for a coordinator's orders."""

    def __init__(
        self,
        n_hosts: int,
        *,
        lanes: int = 1,
        train: bool = True,
        epoch: int = 0,
        step: int = 0,
        replicas: int = 1,
        empty: bool = False,
    ) -> None:
        single = plan_placement(len(LAYERS), CONFIG.n_routed_experts, CONFIG.n_group, n_hosts)
        self.holders = tuple(
            tuple(tuple((hosts[0] + rank) % n_hosts for rank in range(replicas)) for hosts in row)
            for row in single
        )
        self.hosts = [
            ExpertHost(
                f"host-{index}",
                CONFIG,
                InitialExperts(
                    source=SeededSource(),
                    experts={} if empty else experts_held(self.holders, LAYERS, index),
                    epoch=epoch,
                    step=step,
                ),
                settings=HostSettings(
                    optimizer=SETTINGS if train else None, dtype=torch.float64, commit_timeout=20
                ),
                resources=HostResources(open_source=(lambda _: SeededSource()) if empty else None),
            )
            for index in range(n_hosts)
        ]
        self.servers = [local.serve(host.handle) for host in self.hosts]
        self.infos = tuple(
            HostInfo(id=host.id, addresses={"local": server.address})
            for host, server in zip(self.hosts, self.servers, strict=True)
        )
        self.router = Router(
            "worker-0",
            "run",
            CONFIG,
            self.table(epoch),
            lambda host: self.connect(host),  # which a test may replace
            RouterSettings(lanes=lanes),
            tables=self,
        )

    def table(self, epoch: int) -> RoutingTable:
        return RoutingTable(epoch=epoch, hosts=self.infos, holders=self.holders)

    def newest(self, weights: str) -> RoutingTable:
        return self.table(max(host.epoch for host in self.hosts))

    def after(self, serial: int, weights: str, timeout: float) -> RoutingTable | None:
        threading.Event().wait(timeout)
        return None

    def suspect(self, host_id: str, why: str) -> None:
        """Do nothing: these hosts have no coordinator."""

    def connect(self, host: HostInfo) -> Channel:
        return local.connect(host.addresses["local"])

    def lane(self, step: int = 0, microbatch: int = 0, index: int = 0) -> Lane:
        lane = self.router.lane(index)
        lane.begin(step, microbatch)
        return lane

    def commit(self, step: int, rate: float = 1e-2, scale: float = 1.0) -> float:
        squared = sum(host.prepare(step) for host in self.hosts)
        for host in self.hosts:
            host.commit(step, rate, scale)
        return squared

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """w13 and w2 of all experts of a layer, gathered from the hosts."""
        w13, w2 = (torch.empty_like(weight) for weight in local_experts().weights(layer))
        with torch.no_grad():
            for host in self.hosts:
                for at, expert, one, two in host.weights():
                    if at == layer:
                        w13[expert], w2[expert] = one, two
        return w13.detach(), w2.detach()
