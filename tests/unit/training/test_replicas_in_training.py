"""Experts with several holders make the same training steps as with one holder each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.common_snapshot import TRUNK
from actors.coordinator.placement_controller import PlacementController
from actors.coordinator.training_steps import Beginning, TrainingSteps
from actors.coordinator.transfer_plan import PlacementSpec
from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.host.host_server import ExpertHostServer
from actors.messages.steps import StepDecision, StepReport, TrainingPlan
from actors.messages.transfer_orders import Blob, Pull
from actors.router import Router
from actors.rpc.host_client import HostClient
from channels import choose
from cluster.topology import HostInfo
from errors import ChannelError, Interrupted, ProtocolError
from model.checkpoints.shards import ShardReader
from support.moving_cluster import same
from support.tiny_cluster import CONFIG, LAYERS, SETTINGS, SeededSource, tokens

E = CONFIG.n_routed_experts
PLAN = TrainingPlan(steps=100, workers=1, learning_rate=1e-2, clip_norm=0.5, snapshot_interval=1)


class ReplicatedCluster:
    """A coordinator, hosts behind gRPC, and one worker whose trunk is random tokens."""

    def __init__(self, n_hosts: int, *, replicas: int = 1, redundant: int = 0) -> None:
        spec = PlacementSpec(
            layers=LAYERS, n_experts=E, n_group=CONFIG.n_group, replicas=replicas, redundant=redundant
        )
        self.coordinator = Coordinator(
            spec,
            HostPolicy(hosts=n_hosts, dead_after=60.0),
            control=self.control,
            initial=InitialWeights(step=0),
            steps=self.steps,
        )
        self.hosts: dict[str, ExpertHost] = {}
        self.servers: dict[str, ExpertHostServer] = {}
        for at in range(n_hosts):
            self.add(f"host-{at}")
        self.coordinator.place_experts()
        self.router = Router("worker-0", "run", CONFIG, self.coordinator.table(), self.connect)
        self.training = self.coordinator.steps
        self.training.join(0, 1, -1, "")

    def control(self, info: HostInfo) -> HostClient:
        return HostClient(info, timeout=20)

    def connect(self, info: HostInfo) -> choose.Channel:
        return choose.connect(info.addresses["grpc"])

    def steps(self, placements: PlacementController) -> TrainingSteps:
        bias = torch.zeros(len(LAYERS), E)
        begin = Beginning(directory="", step=0, moments=False, bias=bias)
        return TrainingSteps(PLAN, (len(LAYERS), E), placements, beginning=lambda: begin)

    def add(self, id: str) -> None:
        self.hosts[id] = ExpertHost(
            id,
            CONFIG,
            InitialExperts(source=SeededSource()),
            settings=HostSettings(optimizer=SETTINGS, dtype=torch.float64, commit_timeout=20.0),
            resources=HostResources(open_source=lambda _: SeededSource()),
        )
        self.servers[id] = ExpertHostServer(self.hosts[id])
        self.coordinator.register_host(self.servers[id].info)

    def run(self, step: int) -> StepDecision:
        """Two microbatches through all layers, forward and backward, and the end of the step."""
        loads = torch.zeros(len(LAYERS), E, dtype=torch.int64)
        for microbatch in range(2):
            lane = self.router.lane(0)
            lane.begin(step, microbatch)
            for row, layer in enumerate(LAYERS):
                rows, idx, gates = tokens(11, seed=10 * step + microbatch, grad=True)
                out = lane.dispatch(layer, rows, idx, gates).combine()
                out.square().sum().backward()
                loads[row] += torch.bincount(idx.flatten(), minlength=E)
        report = StepReport(worker=0, step=step, loads=loads, n_targets=1, n_rows=1)
        decision = self.training.report(report)
        if decision.epoch != self.router.table.epoch:
            self.router.set_table(self.coordinator.table())
        self.training._commits.finish()
        if decision.snapshot:
            for host in self.hosts.values():
                host.put(Blob(name=TRUNK, step=step + 1, tensors={}))
        return decision

    def state(self) -> dict[tuple[int, int], list[Tensor]]:
        """The state of every expert; asserts that all its holders agree."""
        found: dict[tuple[int, int], list[Tensor]] = {}
        for host in self.hosts.values():
            mine = {(layer, e): [w13.clone(), w2.clone()] for layer, e, w13, w2 in host.weights()}
            for layer, e, one, two in host.moments():
                mine[layer, e] += [tensor.clone() for tensor in (*one, *two)]
            shared = mine.keys() & found.keys()
            assert same({k: mine[k] for k in shared}, {k: found[k] for k in shared}, atol=1e-15)
            found |= mine
        return found

    def holders(self) -> list[int]:
        return [len(hosts) for row in self.coordinator.table().holders for hosts in row]

    def close(self) -> None:
        self.router.close()
        self.coordinator.close()
        for server in self.servers.values():
            server.close()

    def __enter__(self) -> ReplicatedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def plain() -> tuple[list[StepDecision], dict[tuple[int, int], list[Tensor]]]:
    """Five steps with one holder of each expert."""
    with ReplicatedCluster(1) as cluster:
        return [cluster.run(step) for step in range(5)], cluster.state()


def agrees(
    cluster: ReplicatedCluster, decisions: list[StepDecision], plain: tuple[list[StepDecision], dict]
) -> None:  # type: ignore[type-arg]
    expected, state = plain
    assert [one.grad_norm for one in decisions] == pytest.approx([o.grad_norm for o in expected], rel=1e-12)
    assert any(one.scale < 1 for one in expected), "no step was clipped"
    assert same(cluster.state(), state, atol=1e-12)


@pytest.mark.parametrize(("hosts", "replicas"), [(3, 2), (2, 2), (4, 3)])
def test_replicas_change_no_step(hosts: int, replicas: int, plain) -> None:  # type: ignore[no-untyped-def]
    with ReplicatedCluster(hosts, replicas=replicas) as cluster:
        assert set(cluster.holders()) == {replicas}
        decisions = [cluster.run(step) for step in range(5)]
        agrees(cluster, decisions, plain)
        rows = {id: host.stats().rows for id, host in cluster.hosts.items()}
        assert min(rows.values()) > 0, "a holder was given no tokens"


def test_hot_experts_get_replicas_between_two_steps(plain) -> None:  # type: ignore[no-untyped-def]
    with ReplicatedCluster(3, redundant=2) as cluster:
        assert set(cluster.holders()) == {1}
        decisions = [cluster.run(step) for step in range(2)]
        loads = torch.ones(len(LAYERS), E)
        loads[:, 3] = 50.0
        cluster.coordinator.placements.rebalance("expert 3 is hot", loads)
        decisions += [cluster.run(step) for step in range(2, 5)]
        assert Counter(cluster.holders())[1] < E * len(LAYERS)
        agrees(cluster, decisions, plain)


def test_a_checkpoint_has_every_expert_once(tmp_path: Path) -> None:
    with ReplicatedCluster(3, replicas=2) as cluster:
        cluster.run(0)
        files = cluster.training.save(str(tmp_path), 1)
        names = Counter(name for file in files for name in ShardReader(tmp_path / file).names)
        assert set(names.values()) == {1}
        weights = [name for name in names if "exp_avg" not in name]
        assert len(weights) == 3 * E * len(LAYERS)


def test_a_lost_holder_interrupts_though_others_hold_its_experts(plain) -> None:  # type: ignore[no-untyped-def]
    """The lost host's share of the step's gradients is lost."""
    with ReplicatedCluster(3, replicas=2) as cluster:
        decisions = [cluster.run(step) for step in range(3)]
        cluster.servers.pop("host-1").close()
        del cluster.hosts["host-1"]
        cluster.coordinator.roster.lose("host-1", "its process ended")
        with pytest.raises((ChannelError, Interrupted)):
            cluster.run(3)
        resume = cluster.training.join(0, 1, 0, "host-1 was lost", timeout=20)
        assert resume.attempt == 1 and 0 < resume.step <= 3
        cluster.router.set_table(cluster.coordinator.table())
        assert set(cluster.holders()) == {2}
        again = [cluster.run(step) for step in range(resume.step, 5)]
        agrees(cluster, [*decisions[: resume.step], *again], plain)


def test_a_host_that_was_not_told_of_its_epoch_is_told_again(plain) -> None:  # type: ignore[no-untyped-def]
    with ReplicatedCluster(3, replicas=2) as cluster:
        decisions = [cluster.run(0)]
        host = cluster.hosts["host-1"]
        retain = host.retain
        host.retain = lambda *epochs: None  # type: ignore[method-assign]
        loads = torch.ones(len(LAYERS), E)
        loads[:, 3] = 50.0
        cluster.coordinator.placements.rebalance("expert 3 is hot", loads)
        decisions.append(cluster.run(1))
        assert host.epoch < cluster.router.table.epoch
        host.retain = retain  # type: ignore[method-assign]
        decisions += [cluster.run(step) for step in range(2, 5)]
        agrees(cluster, decisions, plain)


def test_a_host_that_dies_while_experts_move_to_it_is_missed(tmp_path: Path) -> None:
    """The host was in no table when it died, so no call reports its loss; others hold its experts."""
    with ReplicatedCluster(2, replicas=2) as cluster:
        cluster.run(0)
        cluster.coordinator.scale(3, 0.0)
        cluster.add("host-2")
        roster = cluster.coordinator.roster
        publish = roster.published.publish

        def lose_and_publish(*arguments: object) -> None:
            roster.published.publish = publish  # type: ignore[method-assign]
            cluster.servers.pop("host-2").close()
            del cluster.hosts["host-2"]
            roster.lose("host-2", "its process ended")
            publish(*arguments)  # type: ignore[arg-type]

        roster.published.publish = lose_and_publish  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            cluster.run(1)
        resume = cluster.training.join(0, 1, 0, "host-2 was lost", timeout=20)
        assert resume.attempt == 1
        cluster.router.set_table(cluster.coordinator.table())
        cluster.run(resume.step)
        files = cluster.training.save(str(tmp_path), resume.step + 1)
        names = Counter(name for file in files for name in ShardReader(tmp_path / file).names)
        assert len([name for name in names if "exp_avg" not in name]) == 3 * E * len(LAYERS)
        assert set(names.values()) == {1}


def test_no_step_is_committed_without_its_sums() -> None:
    with ReplicatedCluster(2, replicas=2) as cluster:
        cluster.run(0)
        for host in cluster.hosts.values():
            host.seal(1)
        with pytest.raises(ProtocolError, match="without a prepare"):
            cluster.hosts["host-0"].commit(1, 1e-2, 1.0)


def test_gradients_are_given_when_they_are_sealed_and_not_before() -> None:
    with ReplicatedCluster(2, replicas=2) as cluster:
        cluster.run(0)
        host = cluster.hosts["host-0"]
        pull = {"experts": {LAYERS[0]: (0,)}, "base": host.epoch, "gradients": True}
        with pytest.raises(ProtocolError, match="at step 1, not at step 0"):
            list(host.fetch(Pull(**pull, step=0)))  # type: ignore[arg-type]
        with pytest.raises(ProtocolError, match="of an epoch and a step"):
            list(host.fetch(Pull(**pull)))  # type: ignore[arg-type]
