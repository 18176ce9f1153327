"""An expert host with two versions of its weights, a coordinator that changes them, and a router between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.coordinator import Coordinator, HostPolicy, InitialWeights
from actors.coordinator.transfer_plan import PlacementSpec
from actors.host import ExpertHost, HostResources, HostSettings, InitialExperts
from actors.messages.transfer_orders import Assembly
from actors.router import Router
from actors.router.table_updates import CoordinatorTables
from channels.base import Phase, Request, RequestId
from cluster.topology import RoutingTable, experts_held
from errors import CheckpointError, ProtocolError, RaymoeError, ResourceError, StaleEpoch
from support.tiny_cluster import CONFIG, LAYERS, SeededSource, TinyCluster, tokens

EXACT = {"rtol": 0.0, "atol": 1e-12}


class Scaled(SeededSource):
    """A source of weights scaled by a number, which is the name of the directory."""

    def __init__(self, directory: str) -> None:
        self.factor = float(Path(directory).name)

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        w13, w2 = super().expert(layer, expert)
        return w13, w2 * self.factor


FLOAT64 = HostSettings(dtype=torch.float64)
NOTHING = InitialExperts(source=SeededSource())
SCALED = HostResources(open_source=Scaled)


def serving_host(
    open_source: Callable[[str], SeededSource] | None = Scaled, index: int = 0, hosts: int = 1
) -> ExpertHost:
    holders = TinyCluster(hosts).holders
    experts = experts_held(holders, LAYERS, index)
    return ExpertHost(
        f"host-{index}",
        CONFIG,
        InitialExperts(source=SeededSource(), experts=experts),
        settings=FLOAT64,
        resources=HostResources(open_source=open_source),
    )


def load(host: ExpertHost, epoch: int, directory: str) -> None:
    """The same experts with other weights."""
    holders = TinyCluster(1).holders
    experts = {layer: tuple(ids) for layer, ids in experts_held(holders, LAYERS, 0).items()}
    host.assemble(Assembly(epoch=epoch, experts=experts, directory=directory))


def infer(host: ExpertHost, epoch: int, layer: int = LAYERS[0]) -> Tensor:
    rows, idx, gates = tokens(5)
    row_ptr = torch.arange(0, idx.numel() + 1, idx.shape[1], dtype=torch.int32)
    id = RequestId("run", epoch, 0, 0, layer, Phase.INFER, "replica")
    return host.handle(Request(id, (rows, row_ptr, idx.reshape(-1).int(), gates.reshape(-1))))[0]


def test_each_epoch_is_answered_with_its_own_weights_until_it_is_dropped() -> None:
    host = serving_host()
    before = infer(host, 0)
    load(host, 1, "3")
    assert host.epochs == (0, 1)
    assert host.epoch == 0
    assert torch.equal(infer(host, 0), before)
    torch.testing.assert_close(infer(host, 1), 3 * before, **EXACT)
    host.retain(1)
    assert host.epochs == (1,)
    torch.testing.assert_close(infer(host, 1), 3 * before, **EXACT)
    with pytest.raises(StaleEpoch) as caught:
        infer(host, 0)
    assert caught.value.epoch == 1


def test_dropping_what_was_loaded_leaves_what_is_in_use() -> None:
    host = serving_host()
    before = infer(host, 0)
    load(host, 1, "3")
    host.retain(0)
    assert host.epochs == (0,)
    assert torch.equal(infer(host, 0), before)


def test_loading_again_changes_nothing_and_other_weights_are_refused() -> None:
    host = serving_host()
    load(host, 1, "3")
    loaded = infer(host, 1)
    load(host, 1, "3")
    assert torch.equal(infer(host, 1), loaded)
    with pytest.raises(ProtocolError, match="holds epoch 1 already"):
        load(host, 1, "4")
    with pytest.raises(ProtocolError, match="holds epochs"):
        host.retain(7)


def test_weights_that_cannot_be_loaded_leave_no_trace() -> None:
    class Damaged(Scaled):
        def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
            if layer == LAYERS[-1]:
                raise CheckpointError("model.layers.2.mlp.experts.0.gate_proj.weight is missing")
            return super().expert(layer, expert)

    host = serving_host(Damaged)
    before = infer(host, 0)
    with pytest.raises(CheckpointError, match="is missing"):
        load(host, 1, "3")
    assert host.epochs == (0,)
    assert torch.equal(infer(host, 0), before)


def test_a_host_that_opens_no_directories_takes_no_other_weights() -> None:
    with pytest.raises(ProtocolError, match="takes no other weights"):
        load(serving_host(open_source=None), 1, "3")


def test_requests_are_answered_while_weights_are_loaded() -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(Scaled):
        def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
            loading.set()
            assert go_on.wait(20)
            return super().expert(layer, expert)

    host = serving_host(Slow)
    before = infer(host, 0)
    thread = threading.Thread(target=load, args=(host, 1, "3"))
    thread.start()
    assert loading.wait(20)
    assert torch.equal(infer(host, 0), before)
    with pytest.raises(StaleEpoch):  # not half of it
        infer(host, 1)
    go_on.set()
    thread.join()
    torch.testing.assert_close(infer(host, 1), 3 * before, **EXACT)


class Weighted(TinyCluster):
    """Serving hosts and their coordinator."""

    def __init__(self, n_hosts: int) -> None:
        super().__init__(n_hosts)
        for index, server in enumerate(self.servers):
            self.hosts[index] = ExpertHost(
                f"host-{index}", CONFIG, NOTHING, settings=FLOAT64, resources=SCALED
            )
            server.handler = self.hosts[index].handle
        by_id = {host.id: host for host in self.hosts}
        self.coordinator = Coordinator(
            PlacementSpec(layers=LAYERS, n_experts=CONFIG.n_routed_experts, n_group=CONFIG.n_group),
            HostPolicy(hosts=n_hosts),
            control=lambda info: by_id[info.id],
            initial=InitialWeights(name="old", directory="1"),
        )
        for info in self.infos:
            self.coordinator.register_host(info)
        self.coordinator.place_experts()

    def __enter__(self) -> Weighted:
        return self

    def __exit__(self, *_: object) -> None:
        self.coordinator.close()

    def replica(self, name: str) -> Router:
        table = self.coordinator.table()
        return Router(name, "run", CONFIG, table, self.connect, tables=CoordinatorTables(self.coordinator))


def computed(router: Router, layer: int = LAYERS[0]) -> Tensor:
    rows, idx, gates = tokens(7)
    return router.lane(0).dispatch(layer, rows, idx, gates).combine()


def test_replicas_change_one_after_the_other_each_with_one_version() -> None:
    with Weighted(2) as cluster:
        first, second = cluster.replica("a"), cluster.replica("b")
        before = computed(first)
        epoch = cluster.coordinator.placements.load("3", "new")
        assert cluster.coordinator.table().weights == "old"
        cluster.coordinator.placements.publish(epoch)
        table = cluster.coordinator.table()
        assert (table.epoch, table.weights) == (epoch, "new")
        first.set_table(table)
        torch.testing.assert_close(computed(first), 3 * before, **EXACT)
        assert torch.equal(computed(second), before)
        second.set_table(table)
        cluster.coordinator.placements.retire()
        assert [host.epochs for host in cluster.hosts] == [(epoch,)] * 2
        torch.testing.assert_close(computed(second), 3 * before, **EXACT)
        torch.testing.assert_close(computed(cluster.replica("c")), 3 * before, **EXACT)


def test_one_host_that_cannot_load_makes_all_of_them_drop_it() -> None:
    with Weighted(2) as cluster:
        before = computed(cluster.replica("a"))
        cluster.hosts[1].transfers.resources = HostResources()
        with pytest.raises(
            RaymoeError, match=r"host-1 failed to load the weights: .* takes no other weights"
        ):
            cluster.coordinator.placements.load("3", "new")
        assert [host.epochs for host in cluster.hosts] == [(0,)] * 2
        assert torch.equal(computed(cluster.replica("b")), before)
        cluster.hosts[1].transfers.resources = SCALED
        assert cluster.coordinator.placements.load("3", "new") == 2  # no epoch stands for two attempts


def test_only_what_was_loaded_last_can_be_published() -> None:
    with Weighted(1) as cluster:
        with pytest.raises(ResourceError, match="load them again"):
            cluster.coordinator.placements.publish(1)
        epoch = cluster.coordinator.placements.load("3", "new")
        cluster.coordinator.placements.retire()
        with pytest.raises(ResourceError, match="load them again"):
            cluster.coordinator.placements.publish(epoch)
        epoch = cluster.coordinator.placements.load("3", "new")
        cluster.coordinator.placements.publish(epoch)
        cluster.coordinator.placements.publish(epoch)
        assert RoutingTable.from_json(cluster.coordinator.table().to_json()).weights == "new"


def test_a_step_that_began_with_weights_that_are_gone_fails_and_is_not_mixed() -> None:
    with Weighted(2) as cluster:
        late = cluster.replica("late")
        before = computed(late)
        cluster.coordinator.placements.publish(cluster.coordinator.placements.load("3", "new"))
        cluster.coordinator.placements.retire()
        with pytest.raises(ResourceError, match="hold no weights 'old' any more"):
            computed(late, LAYERS[1])
        late.set_table(cluster.coordinator.table())
        torch.testing.assert_close(computed(late), 3 * before, **EXACT)


def test_a_reload_for_which_there_is_no_room_is_refused_in_one_line() -> None:
    asked: list[int] = []

    def require_room(size: int) -> None:
        asked.append(size)
        raise ResourceError(
            "expert host host-0 needs more than there is; deploy the checkpoint as a new application instead"
        )

    with Weighted(2) as cluster:
        before = computed(cluster.replica("a"))
        cluster.hosts[0].transfers.resources = HostResources(open_source=Scaled, require_room=require_room)
        with pytest.raises(ResourceError, match=r"host-0 failed to load .* needs more than") as caught:
            cluster.coordinator.placements.load("3", "new")
        assert "\n" not in str(caught.value)
        experts = sum(len(ids) for ids in experts_held(cluster.holders, LAYERS, 0).values())
        assert asked == [experts * 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 8]
        assert [host.epochs for host in cluster.hosts] == [(0,)] * 2
        assert torch.equal(computed(cluster.replica("b")), before)


def test_what_a_host_begins_with_needs_no_room_beside_anything() -> None:
    def refuse(size: int) -> None:
        raise AssertionError(f"asked for {size}")

    host = ExpertHost(
        "host-0",
        CONFIG,
        NOTHING,
        settings=FLOAT64,
        resources=HostResources(open_source=Scaled, require_room=refuse),
    )
    host.assemble(Assembly(epoch=0, experts={LAYERS[0]: (0, 1)}, directory="1"))
    assert host.epochs == (0,)
