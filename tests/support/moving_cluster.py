"""Expert hosts behind gRPC servers, whose experts move; the test makes the steps, without a router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.host.host_server import ExpertHostServer
from actors.messages.transfer_orders import Assembly, Origin
from actors.rpc.host_client import HostClient
from channels.base import Phase, Request, RequestId
from cluster.topology import HostInfo
from model.checkpoints.shards import ShardReader
from support.tiny_cluster import CONFIG, LAYERS, SETTINGS, SeededSource, tokens

ALL = tuple(range(CONFIG.n_routed_experts))
ONE = {"a": {layer: ALL for layer in LAYERS}}
"""Host a holds all experts."""

Holding = Mapping[str, Mapping[int, tuple[int, ...]]]


def split(*hosts: str) -> dict[str, dict[int, tuple[int, ...]]]:
    """Every layer's experts distributed over hosts, differently in each layer."""
    n = len(hosts)
    return {
        host: {layer: tuple(e for e in ALL if (e + layer) % n == at) for layer in LAYERS}
        for at, host in enumerate(hosts)
    }


class MovingCluster:
    """Hosts by name; `began` has the experts that each begins with, `{}` for none."""

    def __init__(self, began: Holding, *, train: bool = True, **resources: Any) -> None:
        self.train = train
        self.epoch = 0
        self.step = 0
        self.holding: dict[str, Mapping[int, tuple[int, ...]]] = {h: dict(e) for h, e in began.items() if e}
        self.hosts: dict[str, ExpertHost] = {}
        self.servers: dict[str, ExpertHostServer] = {}
        for name, experts in began.items():
            self.add(name, experts, **resources)

    def add(self, name: str, experts: Mapping[int, Sequence[int]], **resources: Any) -> ExpertHost:
        settings = SETTINGS if self.train else None
        host = ExpertHost(
            name,
            CONFIG,
            InitialExperts(source=SeededSource(), experts=experts),
            settings=HostSettings(optimizer=settings, dtype=torch.float64, commit_timeout=20.0),
            resources=HostResources(**resources),
        )
        self.hosts[name] = host
        self.servers[name] = ExpertHostServer(host)
        return host

    def info(self, name: str) -> HostInfo:
        return self.servers[name].info

    @contextmanager
    def client(self, name: str) -> Iterator[HostClient]:
        client = HostClient(self.info(name), timeout=20)
        try:
            yield client
        finally:
            client.close()

    def forward(self, layer: int, rows: Tensor, idx: Tensor, gates: Tensor, phase: Phase) -> Tensor:
        """The sum over the hosts that hold experts."""
        return torch.stack(
            [
                self.hosts[host].handle(self.request(host, layer, phase, rows, idx, gates))[0]
                for host in self.holding
            ]
        ).sum(0)

    def request(
        self, host: str, layer: int, phase: Phase, rows: Tensor, idx: Tensor, gates: Tensor
    ) -> Request:
        here = torch.isin(idx, torch.tensor(self.holding[host].get(layer, ()), dtype=idx.dtype))
        row_ptr = torch.cat((torch.zeros(1, dtype=torch.int64), here.sum(1).cumsum(0))).int()
        return Request(self.id(layer, phase), (rows, row_ptr, idx[here].int(), gates[here]))

    def id(self, layer: int, phase: Phase) -> RequestId:
        return RequestId("run", self.epoch, self.step, 0, layer, phase, "worker-0")

    def infer(self) -> list[Tensor]:
        return [self.forward(layer, *tokens(7), Phase.INFER) for layer in LAYERS]

    def advance(self, steps: int = 1) -> None:
        """Make whole steps: forward and backward of each layer, prepare, commit."""
        for _ in range(steps):
            for layer in LAYERS:
                out = self.forward(layer, *tokens(9, seed=self.step), Phase.FORWARD)
                for host in self.holding:
                    self.hosts[host].handle(Request(self.id(layer, Phase.BACKWARD), (2 * out,)))
            for host in self.hosts.values():
                host.prepare(self.step)
            for host in self.hosts.values():
                host.commit(self.step, 1e-2, 0.7)
            self.step += 1

    def origins(self, *but: str) -> tuple[Origin, ...]:
        """The hosts that hold experts, as origins of a transfer."""
        return tuple(
            Origin(host=self.info(host), experts=experts)
            for host, experts in self.holding.items()
            if host not in but
        )

    def move(self, holding: Holding, **changes: Any) -> None:
        """Assemble a new epoch on all hosts over gRPC, then let them drop the old one."""
        epoch, origins = self.epoch + 1, self.origins()
        for name in self.hosts:
            order = {
                "epoch": epoch,
                "experts": holding.get(name, {}),
                "base": self.epoch,
                "step": self.step if self.train else None,
                "origins": tuple(origin for origin in origins if origin.host.id != name),
            }
            with self.client(name) as client:
                client.assemble(Assembly(**order | changes))
        self.switch(epoch, holding)

    def switch(self, epoch: int, holding: Holding) -> None:
        for name in self.hosts:
            with self.client(name) as client:
                client.retain(epoch)
        self.epoch = epoch
        self.step = next(iter(self.hosts.values())).step
        self.holding = dict(holding)

    def kill(self, name: str) -> None:
        self.servers.pop(name).close()
        del self.hosts[name]

    def state(self) -> dict[tuple[int, int], list[Tensor]]:
        """Copies of weights, and of moments in training, by (layer, expert)."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for host in self.hosts.values():
            for layer, expert, w13, w2 in host.weights():
                found[layer, expert] = [w13.clone(), w2.clone()]
            for layer, expert, one, two in host.moments():
                found[layer, expert] += [tensor.clone() for tensor in (*one, *two)]
        return found

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def entries(cluster: MovingCluster, name: str) -> list[tuple[str, str, int]]:
    """Kind, owner and step of what a host keeps in memory."""
    with cluster.client(name) as client:
        return [(one.kind, one.owner, one.step) for one in client.inventory()]


def same(
    one: Mapping[tuple[int, int], Sequence[Tensor]],
    other: Mapping[tuple[int, int], Sequence[Tensor]],
    *,
    atol: float = 0.0,
) -> bool:
    """Whether two states have the same experts with the same tensors."""
    return one.keys() == other.keys() and all(
        len(one[key]) == len(other[key])
        and all(torch.allclose(a, b, rtol=0.0, atol=atol) for a, b in zip(one[key], other[key], strict=True))
        for key in one
    )


class CheckpointSource:
    """A source of weights over the checkpoint files of several hosts."""

    def __init__(self, directory: Path) -> None:
        self.readers = [ShardReader(path) for path in directory.glob("model-*.safetensors")]

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (self.one(f"{prefix}.{p}_proj.weight") for p in ("gate", "up", "down"))
        return torch.cat((gate, up)), down

    def one(self, name: str) -> Tensor:
        (reader,) = (reader for reader in self.readers if name in reader)
        return reader.tensor(name)

    def trunk(self) -> dict[str, Tensor]:
        return {}
