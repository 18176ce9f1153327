"""Snapshots on their way between hosts: what a stream of a snapshot must be, and what a broken one leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.host.snapshot_store import SnapshotStore
from actors.messages import tensor_stream as state_stream
from actors.messages.transfer_orders import Assembly, Blob
from errors import ProtocolError, StaleEpoch
from protos import expert_pb2
from support.moving_cluster import ONE, entries
from support.tiny_cluster import CONFIG
from support.waiting import wait_until


def test_a_blob_over_grpc(made: Any) -> None:
    cluster = made({"a": {}})
    tensors = {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "large": torch.randn(3 << 20),
        "half": torch.randn(7).bfloat16(),
        "none": torch.empty(0, 4),
        "count": torch.tensor(5),
    }
    note = json.dumps({"rows": [1, 2]})
    with cluster.client("a") as client:
        for step in (4, 5, 6):
            client.put(
                Blob(name="trunk", step=step, tensors={**tensors, "step": torch.tensor([step])}, note=note)
            )
        got = client.get("trunk", 5)
        assert (got.name, got.step, got.note) == ("trunk", 5, note)
        assert list(got.tensors) == [*tensors, "step"]
        for name, tensor in tensors.items():
            assert got.tensors[name].dtype == tensor.dtype
            assert got.tensors[name].shape == tensor.shape
            assert torch.equal(got.tensors[name], tensor)
        assert torch.equal(cluster.hosts["a"].get("trunk", 6).tensors["step"], torch.tensor([6]))
        with pytest.raises(ProtocolError, match="keeps no trunk of step 4"):
            client.get("trunk", 4)
        with pytest.raises(ProtocolError, match=r"x is torch\.bool, which does not travel"):
            client.put(Blob(name="trunk", step=7, tensors={"x": torch.ones(1, dtype=torch.bool)}))
        client.put(Blob(name="trunk", step=3, tensors={}))  # older than two other snapshots
        client.put(Blob(name="trunk", step=6, tensors={"y": torch.ones(2)}))
    assert entries(cluster, "a") == [("trunk", "trunk", 5), ("trunk", "trunk", 6)]
    assert list(cluster.hosts["a"].get("trunk", 6).tensors) == ["y"]


def test_a_sender_that_fails_in_the_middle_leaves_nothing(made: Any) -> None:
    cluster = made({"a": {}})
    sent = Blob(name="trunk", step=1, tensors={"x": torch.ones(4), "y": torch.ones(1 << 21)})

    def failing() -> Iterator[bytes]:
        from actors.messages.transfer_codec import blob_frames

        frames = blob_frames(sent)
        yield next(frames)
        yield next(frames)
        raise ProtocolError("changed its mind")

    with cluster.client("a") as client:
        with pytest.raises(ProtocolError, match="changed its mind"):
            client.store(failing())
        wait_until(lambda: cluster.hosts["a"].snapshots.memory_bytes() == 0)
        assert client.inventory() == []
        client.put(sent)
        assert torch.equal(client.get("trunk", 1).tensors["x"], torch.ones(4))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "experts", "owner": "a"}, "keeps its own experts itself"),
        ({"kind": "trunk", "owner": "b"}, "neither experts nor a blob"),
        ({"kind": "experts", "owner": "b", "experts": [{"layer": 0, "experts": [1]}]}, "has no experts"),
        (
            {"kind": "experts", "owner": "b", "experts": [{"layer": 1, "experts": [1]}]},
            "ended within number 0",
        ),
        ({"kind": "t", "owner": "t", "tensors": [{"name": "x", "dtype": 1, "shape": [-1]}]}, "cannot be"),
        (
            {"kind": "t", "owner": "t", "tensors": [{"name": "x", "dtype": 1, "shape": [1 << 50]}]},
            "cannot be",
        ),
        ({"kind": "t", "owner": "t", "tensors": [{"name": "x", "shape": [1]}]}, "cannot be"),
    ],
)
def test_a_stream_of_what_cannot_be_is_refused(stored: Any, message: str) -> None:
    memory = SnapshotStore("a", CONFIG, torch.float64)
    with pytest.raises(ProtocolError, match=message):
        memory.store(iter([state_stream.heading_frame(expert_pb2.StoredState(**stored))]))
    assert memory.memory_bytes() == 0


@pytest.mark.parametrize("frames", [[], [b""], [b"\xff\xff"], [expert_pb2.Frame().SerializeToString()]])
def test_a_stream_without_a_head_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="stream"):
        SnapshotStore("a", CONFIG, torch.float64).store(iter(frames))


def test_the_same_is_not_stored_twice_at_a_time() -> None:
    memory = SnapshotStore("a", CONFIG, torch.float64)
    head = state_stream.heading_frame(expert_pb2.StoredState(kind="t", owner="t", step=1))

    def twice() -> Iterator[bytes]:
        yield head
        with pytest.raises(ProtocolError, match="is storing t of t already"):
            memory.store(iter([head]))

    memory.store(twice())
    assert [one.step for one in memory.inventory()] == [1]


def test_a_snapshot_of_an_epoch_that_is_gone_is_refused(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    host.assemble(Assembly(epoch=1, experts=ONE["a"], base=0, step=0))
    await_commit = host.versions.await_commit

    def late(*arguments: Any) -> None:
        await_commit(*arguments)
        host.retain(1)

    monkeypatch.setattr(host.versions, "await_commit", late)
    with pytest.raises(ProtocolError, match="has gone on to epoch 1"):
        host.snapshot(0, [])
    with pytest.raises(StaleEpoch):
        cluster.infer()
