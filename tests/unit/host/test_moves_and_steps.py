"""Experts move while steps are committed, epochs are dropped and hosts are drained; orders on the wire."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from actors.messages import tensor_stream as state_stream
from actors.messages import transfer_codec as state_wire
from actors.messages.tensor_stream import TensorFiller
from actors.messages.transfer_orders import Assembly, Origin, Pull, StoredCopy
from channels.base import Phase, Request
from cluster.topology import HostInfo
from errors import ProtocolError, RaymoeError, RemoteError, StaleEpoch
from support.moving_cluster import ONE, same, split
from support.tiny_cluster import LAYERS, SeededSource, tokens


def test_live_state_of_another_step_is_refused(made: Any) -> None:
    cluster = made({**ONE, "b": {}})
    cluster.advance()
    order = {"epoch": 1, "experts": ONE["a"], "base": 0, "origins": cluster.origins()}
    for step in (0, 2):
        with pytest.raises(RemoteError, match=rf"host a is at step 1, not at step {step}"):
            cluster.hosts["b"].assemble(Assembly(**order, step=step))
        with pytest.raises(ProtocolError, match="is at step 1"):
            cluster.hosts["a"].assemble(Assembly(**order, step=step))
    with pytest.raises(ProtocolError, match="say of which step"):
        cluster.hosts["b"].assemble(Assembly(**order))


def test_a_fetch_waits_for_a_commit_that_is_under_way(made: Any) -> None:
    cluster = made({**ONE, "b": {}})
    cluster.hosts["a"].prepare(0)
    order = Assembly(epoch=1, experts=ONE["a"], base=0, step=1, origins=cluster.origins())
    thread = threading.Thread(target=cluster.hosts["b"].assemble, args=(order,))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    cluster.hosts["a"].commit(0, 1e-2, 1.0)
    thread.join(20)
    assert cluster.hosts["b"].epochs == (0, 1)
    cluster.hosts["b"].retain(1)
    mine, other = (list(cluster.hosts[name].weights()) for name in "ab")
    assert all(torch.equal(x[2], y[2]) for x, y in zip(mine, other, strict=True))


def test_a_commit_in_the_middle_of_a_fetch_ends_it(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_stream, "FRAME_BYTES", 512)
    cluster = made(ONE)
    host = cluster.hosts["a"]
    frames = host.fetch(Pull(experts=ONE["a"], base=0, step=0, moments=True))
    next(frames)
    cluster.advance()
    with pytest.raises(ProtocolError, match="is at step 1, not at step 0"):
        next(frames)


def test_a_failed_commit_gives_nothing_away_and_ends_with_its_epoch(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = made({**ONE, "b": {}}, open_source=lambda _: SeededSource())
    host = cluster.hosts["a"]
    host.prepare(0)
    with monkeypatch.context() as patch:
        patch.setattr("model.optimizers.adamw.AdamW.step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            host.commit(0, 1e-2, 1.0)
    for step in (0, 1):
        with pytest.raises(RaymoeError, match="failed in the commit of step 0"):
            next(host.fetch(Pull(experts=ONE["a"], base=0, step=step)))
    cluster.move(ONE, base=None, step=0, origins=(), directory="x")
    cluster.advance()
    untouched = made(ONE)
    untouched.advance()
    assert same(cluster.state(), untouched.state())


def test_requests_of_a_dropped_epoch_leave_no_trace_in_the_next(made: Any) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    layer = LAYERS[0]
    host.handle(cluster.request("a", layer, Phase.FORWARD, *tokens(5)))
    host.assemble(Assembly(epoch=1, experts=ONE["a"], base=0, step=0))
    cluster.epoch = 1
    host.handle(cluster.request("a", layer, Phase.FORWARD, *tokens(5, seed=1)))  # before the others retain
    assert host.stats().kept == 2
    host.retain(1)
    host.retain(1)
    assert host.stats().kept == 1
    old = cluster.id(layer, Phase.BACKWARD)._replace(epoch=0)
    with pytest.raises(StaleEpoch) as caught:
        host.handle(Request(old, (tokens(5)[0],)))
    assert caught.value.epoch == 1
    assert host.handle(Request(old._replace(phase=Phase.RELEASE))) == ()
    assert host.stats().kept == 1
    host.handle(Request(cluster.id(layer, Phase.BACKWARD), (tokens(5)[0],)))
    assert any(gradient.any() for gradient in host.gradients())


def test_a_request_that_waits_for_a_step_of_a_dropped_epoch_is_refused(made: Any) -> None:
    cluster = made(ONE)
    host = cluster.hosts["a"]
    errors: list[Exception] = []

    def call() -> None:
        try:
            host.handle(Request(cluster.id(LAYERS[0], Phase.INFER)._replace(step=1)))
        except RaymoeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    host.assemble(Assembly(epoch=1, experts=ONE["a"], base=0, step=0))
    host.retain(1)
    thread.join(10)
    assert isinstance(errors[0], StaleEpoch)


def test_a_drained_host_takes_part_in_steps(made: Any) -> None:
    cluster = made(split("a", "b"))
    cluster.move(split("b"))
    drained = cluster.hosts["a"]
    assert drained.prepare(0) == 0.0
    drained.commit(0, 1e-2, 1.0)
    assert drained.step == 1
    with pytest.raises(ProtocolError, match="has no experts of layer 1"):
        drained.handle(Request(cluster.id(1, Phase.INFER)))


def test_stats_and_loads_over_grpc(made: Any) -> None:
    cluster = made(ONE)
    cluster.advance()
    _, idx, _ = tokens(9, seed=0)
    with cluster.client("a") as client:
        stats, loads = client.stats(), client.loads()
    assert loads.tolist() == [torch.bincount(idx.flatten(), minlength=8).tolist()] * len(LAYERS)
    assert stats == cluster.hosts["a"].stats()
    assert (stats.epochs, stats.in_flight, stats.experts) == ((0,), 0, dict.fromkeys(LAYERS, 8))
    assert stats.busy_seconds > 0


def test_orders_survive_the_wire() -> None:
    peer = HostInfo(id="b", node="n", pid=3, addresses={"grpc": "grpc:1.2.3.4:5"})
    origin = Origin(host=peer, experts={2: (1,)})
    orders = [
        Assembly(epoch=0, experts={}),
        Assembly(
            epoch=3,
            experts={1: (0, 7), 2: ()},
            base=0,
            step=0,
            origins=(origin,),
        ),
        Assembly(epoch=2, experts={1: (5,)}, step=4, directory="/x", moments=True),
    ]
    for order in orders:
        assert state_wire.assembly_from(state_wire.assembly_to(order)) == order
    for pull in (Pull(experts={1: (2,)}, base=0), Pull(experts={}, step=0, moments=True)):
        assert state_wire.pull_from(state_wire.pull_to(pull)) == pull
    stored = StoredCopy(
        kind="experts", owner="b", step=2, epoch=1, experts={1: (3,)}, pushed=("c",), failed={"d": "no"}
    )
    assert state_wire.stored_from(state_wire.stored_to(stored)) == stored


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([torch.ones(2, 3), torch.ones(1)], "ended within number 1"),
        ([torch.ones(2, 3), torch.ones(4), torch.ones(1)], "goes on after the last"),
        ([torch.ones(7)], r"tensor 0 of a stream is 6 numbers"),
        ([torch.ones(6, dtype=torch.float64)], r"there came \[6\] of torch.float64"),
    ],
)
def test_a_stream_of_the_wrong_tensors_is_refused(sent: list[torch.Tensor], message: str) -> None:
    filler = TensorFiller([torch.empty(2, 3), torch.empty(4)])
    with pytest.raises(ProtocolError, match=message):
        filler.read(state_stream.tensor_frames(sent, lambda: None))


def test_large_tensors_go_in_pieces_and_small_ones_together() -> None:
    tensors = [torch.randn(n) for n in (5 << 20, 3, 0, 7, 1 << 20)]
    frames = list(state_stream.tensor_frames(tensors, lambda: None))
    assert max(map(len, frames)) < state_stream.FRAME_BYTES + 4096
    assert len(frames) == 7
    filled = [torch.empty_like(tensor) for tensor in tensors]
    TensorFiller(filled).read(frames)
    assert all(torch.equal(a, b) for a, b in zip(tensors, filled, strict=True))
