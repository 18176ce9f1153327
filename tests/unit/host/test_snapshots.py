"""Snapshots in hosts' memory, and runs that continue from them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.host.checkpoint_part import SavedMoments
from actors.host.expert_layers import LayerCopy
from actors.messages import tensor_stream as state_stream
from actors.messages.transfer_orders import Assembly, Blob, Origin, Pull
from channels.base import Phase
from cluster.topology import HostInfo
from errors import ProtocolError
from support.moving_cluster import ONE, CheckpointSource, MovingCluster, entries, same, split
from support.tiny_cluster import LAYERS, tokens
from support.waiting import wait_until

RING = {"a": "b", "b": "c", "c": "a"}


def snapshot(cluster: MovingCluster) -> None:
    """Copy each host's state to the next host over gRPC, and wait for it."""
    for name, buddy in RING.items():
        with cluster.client(name) as client:
            client.snapshot(cluster.step, [cluster.info(buddy)])
    for name, buddy in RING.items():
        wait_until(
            lambda n=name, b=buddy: any(  # type: ignore[misc]
                one.pushed == (b,)
                for one in cluster.hosts[n].inventory()
                if (one.owner, one.step) == (n, cluster.step)
            )
        )


def test_a_run_goes_on_from_memory_when_a_host_is_gone(made: Any) -> None:
    still, cluster = made(ONE), made(split("a", "b", "c"))
    for one in (still, cluster):
        one.advance(2)
    snapshot(cluster)
    at_two = cluster.state()
    cluster.advance(2)
    cluster.kill("b")
    two = split("c", "a")
    kept = {name: cluster.hosts[name].inventory() for name in cluster.hosts}
    for name in cluster.hosts:
        origins = tuple(
            Origin(host=cluster.info(peer), experts=one.experts)
            for peer, stored in kept.items()
            for one in stored
            if peer != name and one.step == 2
        )
        with cluster.client(name) as client:
            client.assemble(Assembly(epoch=1, experts=two[name], step=2, origins=origins))
    cluster.switch(1, two)
    assert cluster.step == 2
    assert same(cluster.state(), at_two), "the state of the snapshot, to the bit"
    for one in (still, cluster):
        one.advance(3)
    assert same(still.state(), cluster.state(), atol=1e-12)


def test_what_no_memory_has_comes_from_the_checkpoint(made: Any, tmp_path: Path) -> None:
    cluster = made(
        split("a", "b", "c"),
        open_source=lambda directory: CheckpointSource(Path(directory)),
        open_moments=lambda directory: SavedMoments(Path(directory)),
    )
    cluster.advance()
    at_one = cluster.state()
    for host in cluster.hosts.values():
        host.save(str(tmp_path))
    cluster.hosts["a"].snapshot(1, [])
    cluster.hosts["c"].snapshot(1, [])
    cluster.advance()
    cluster.kill("b")
    for name, experts in split("a", "c").items():
        (peer,) = {"a", "c"} - {name}
        origin = Origin(host=cluster.info(peer), experts=cluster.holding[peer])
        order = Assembly(
            epoch=1, experts=experts, step=1, origins=(origin,), directory=str(tmp_path), moments=True
        )
        cluster.hosts[name].assemble(order)
    cluster.switch(1, split("a", "c"))
    assert same(cluster.state(), at_one)


def test_the_newest_two_steps_are_kept_and_memory_is_used_again(made: Any) -> None:
    cluster = made(split("a", "b", "c"))
    used, where, owed = [], [], 0
    for _ in range(5):
        snapshot(cluster)
        memory = cluster.hosts["a"].snapshots
        used.append(memory.memory_bytes())
        where.append({tensor.data_ptr() for copy in memory._copies for tensor in copy.memory()})
        owed = 2 * sum(
            sum(layer.optimizer.state_buffers()[0].nbytes for layer in host.versions.current.layers.values())
            for host in (cluster.hosts["a"], cluster.hosts["c"])
        )
        cluster.advance()
    assert entries(cluster, "a") == [("experts", host, step) for host in ("a", "c") for step in (3, 4)]
    assert used[1:] == [owed] * 4, "two steps of its own and two of the host whose buddy it is"
    assert where[1] == where[2] == where[3] == where[4]


def test_a_snapshot_is_what_the_state_was(made: Any) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    cluster.advance()
    host.snapshot(1, [])
    before = cluster.state()
    cluster.advance()
    found = {}
    for key in before:
        parts, intact = host.snapshots.find(1, *key)
        found[key] = list(parts)
        intact()
    assert same(before, found)
    assert host.snapshots.find(2, *key) is None


def test_a_repeat_does_nothing_and_another_epoch_takes_its_place(made: Any) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    host.snapshot(0, [])
    (copy,) = host.snapshots._copies
    host.snapshot(0, [])
    assert host.snapshots._copies == [copy]
    host.assemble(Assembly(epoch=1, experts={LAYERS[0]: (3,)}, base=0, step=0))
    host.retain(1)
    assert host.snapshots._copies == [copy]
    host.snapshot(0, [])
    (stored,) = host.inventory()
    assert (stored.epoch, stored.experts) == (1, {LAYERS[0]: (3,)})


def test_a_host_has_to_be_at_the_step_and_to_train(made: Any) -> None:
    cluster = made(ONE)
    with cluster.client("a") as client, pytest.raises(ProtocolError, match="is at step 0, not at step 1"):
        client.snapshot(1, [])
    with pytest.raises(ProtocolError, match="does not train"):
        made(ONE, train=False).hosts["a"].snapshot(0, [])


def test_a_snapshot_waits_for_the_commit_that_is_under_way(made: Any) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    host.prepare(0)
    thread = threading.Thread(target=host.snapshot, args=(1, []))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    host.commit(0, 1e-2, 1.0)
    thread.join(20)
    assert [one.step for one in host.inventory()] == [1]


def test_requests_are_answered_while_memory_is_copied_and_a_commit_waits(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, go_on = threading.Event(), threading.Event()
    take = LayerCopy.take

    def slow(self: LayerCopy, layer: Any) -> None:
        copying.set()
        assert go_on.wait(20)
        take(self, layer)

    monkeypatch.setattr(LayerCopy, "take", slow)
    cluster = made(ONE)
    host, before = cluster.hosts["a"], cluster.state()
    thread = threading.Thread(target=host.snapshot, args=(0, []))
    thread.start()
    assert copying.wait(20)
    host.handle(cluster.request("a", LAYERS[0], Phase.FORWARD, *tokens(5)))
    stepping = threading.Thread(target=cluster.advance)
    stepping.start()
    stepping.join(0.1)
    assert host.step == 0
    assert stepping.is_alive()
    go_on.set()
    thread.join(20)
    stepping.join(20)
    assert host.step == 1
    assert same(before, {key: list(host.snapshots.find(0, *key)[0]) for key in before})


def test_a_push_that_fails_is_remembered_and_breaks_nothing(made: Any) -> None:
    cluster = made(split("a", "b"))
    nobody = HostInfo(id="nobody", addresses={"grpc": "grpc:127.0.0.1:1"})
    with cluster.client("a") as client:
        client.snapshot(0, [nobody, cluster.info("b")])
        wait_until(lambda: client.inventory()[0].pushed == ("b",))
        (stored,) = client.inventory()
        assert list(stored.failed) == ["nobody"]
        assert "cannot be reached" in stored.failed["nobody"]
        assert client.stats().failed_pushes == 1
        cluster.advance()
        client.snapshot(1, [])
    assert cluster.hosts["b"].inventory()[0].owner == "a"


def test_a_peer_serves_what_it_keeps_for_others(made: Any) -> None:
    cluster = made(split("a", "b", "c"))
    snapshot(cluster)
    experts = cluster.holding["a"]
    for pull in (Pull(experts=experts, step=0, moments=True), Pull(experts=experts, step=0)):
        with cluster.client("b") as client:
            frames = b"".join(client.fetch(pull))
        assert frames == b"".join(cluster.hosts["a"].fetch(pull))
    with cluster.client("c") as client, pytest.raises(ProtocolError, match="in what it keeps of step 0"):
        list(client.fetch(Pull(experts=experts, step=0)))
    with pytest.raises(ProtocolError, match="no expert"):
        next(cluster.hosts["a"].fetch(Pull(experts=experts)))


def test_a_reader_of_memory_that_is_used_again_notices(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_stream, "FRAME_BYTES", 512)
    cluster = made(ONE)
    host = cluster.hosts["a"]
    host.snapshot(0, [])
    frames = host.fetch(Pull(experts=ONE["a"], step=0, moments=True))
    next(frames)
    for step in (1, 2):
        cluster.advance()
        host.snapshot(step, [])
    with pytest.raises(ProtocolError, match="experts of a at step 0 are kept no more"):
        next(frames)


def test_what_is_newer_than_the_state_that_a_run_goes_back_to_is_dropped(made: Any) -> None:
    cluster = made(split("a", "b", "c"))
    cluster.advance()
    snapshot(cluster)
    cluster.advance()
    snapshot(cluster)
    blob = Blob(name="trunk", step=2, tensors={"x": torch.ones(1)})
    cluster.hosts["a"].put(blob)
    cluster.move(cluster.holding, base=None, step=1, origins=())
    assert cluster.step == 1
    assert entries(cluster, "a") == [("experts", "a", 1), ("experts", "c", 1)]


def test_an_owner_that_is_gone_is_forgotten_when_it_can_be_of_no_use(made: Any) -> None:
    cluster = made(split("a", "b", "c"))
    snapshot(cluster)
    cluster.hosts["a"].put(Blob(name="trunk", step=0, tensors={}))
    for step in (1, 2, 3):
        cluster.advance()
        cluster.hosts["a"].snapshot(step, [])
    assert entries(cluster, "a") == [("experts", "a", 2), ("experts", "a", 3)]
