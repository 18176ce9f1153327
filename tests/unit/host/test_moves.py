"""Experts that move between hosts, over real gRPC servers, in serving and in training."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.host.checkpoint_part import SavedMoments
from actors.messages import tensor_stream as state_stream
from actors.messages import transfer_codec as state_wire
from actors.messages.tensor_stream import TensorFiller
from actors.messages.transfer_orders import Assembly, Origin, Pull, StoredCopy
from actors.rpc.host_client import HostClient
from channels.base import Phase, Request
from cluster.topology import HostInfo
from errors import ChannelError, ProtocolError, RaymoeError, RemoteError, StaleEpoch
from support.moving_cluster import ALL, CheckpointSource, MovingCluster, same, split
from support.tiny_cluster import LAYERS, SeededSource, tokens

ONE = {"a": {layer: ALL for layer in LAYERS}}


@pytest.fixture
def made() -> Iterator[Any]:
    clusters: list[MovingCluster] = []

    def make(*arguments: Any, **options: Any) -> MovingCluster:
        clusters.append(MovingCluster(*arguments, **options))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


def test_in_serving_experts_move_while_both_epochs_are_answered(made: Any) -> None:
    cluster = made({**ONE, "b": {}, "c": {}}, train=False)
    before, weights = cluster.infer(), cluster.state()
    three = split("a", "b", "c")
    for name in cluster.hosts:
        order = Assembly(epoch=1, experts=three[name], base=0, origins=cluster.origins(name))
        with cluster.client(name) as client:
            client.assemble(order)
    assert all(torch.equal(x, y) for x, y in zip(before, cluster.infer(), strict=True))
    cluster.epoch, cluster.holding = 1, three
    for x, y in zip(before, cluster.infer(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    cluster.switch(1, three)
    assert [host.epochs for host in cluster.hosts.values()] == [(1,)] * 3
    assert same(cluster.state(), weights)
    cluster.move(split("b", "c"))
    assert cluster.hosts["a"].stats().experts == {}
    assert same(cluster.state(), weights)
    for x, y in zip(before, cluster.infer(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_in_serving_layers_that_stay_are_shared(made: Any) -> None:
    cluster = made(ONE, train=False)
    host = cluster.hosts["a"]
    address = [w13.data_ptr() for _, _, w13, _ in host.weights()]
    host.assemble(Assembly(epoch=1, experts={LAYERS[0]: ALL, LAYERS[1]: (0,)}, base=0))
    host.retain(1)
    assert [w13.data_ptr() for _, _, w13, _ in host.weights()][: len(ALL)] == address[: len(ALL)]
    assert host.stats().experts == {LAYERS[0]: 8, LAYERS[1]: 1}


def test_in_training_the_trajectory_is_that_of_experts_that_never_moved(made: Any) -> None:
    still, moving = made(ONE), made({**ONE, "b": {}, "c": {}})
    for cluster in (still, moving):
        cluster.advance(2)
    assert same(still.state(), moving.state())
    moving.move(split("a", "b", "c"))
    assert moving.step == 2
    assert same(still.state(), moving.state()), "moving alone changes no bit"
    for cluster in (still, moving):
        cluster.advance(3)
    at_five = moving.state()
    assert same(still.state(), at_five, atol=1e-12)
    moving.move(split("c", "b"))
    assert same(moving.state(), at_five)
    assert moving.hosts["a"].stats().experts == {}
    for cluster in (still, moving):
        cluster.advance(2)
    assert same(still.state(), moving.state(), atol=1e-12)
    assert not same(still.state(), at_five, atol=1e-3), "the steps moved nothing: this test shows nothing"


def test_the_count_of_steps_moves_too(made: Any) -> None:
    cluster = made({**ONE, "b": {}})
    cluster.advance(3)
    cluster.move(split("b"))
    layers = cluster.hosts["b"].versions.current.layers
    assert [(layer.optimizer.step_count, layer.step) for layer in layers.values()] == [(3, 3)] * len(LAYERS)
    assert not any(gradient.any() for gradient in cluster.hosts["b"].gradients())


def test_what_nobody_has_is_read_from_the_checkpoint(made: Any, tmp_path: Path) -> None:
    cluster = made(split("a", "b"))
    cluster.advance(2)
    for host in cluster.hosts.values():
        host.save(str(tmp_path))
    at_two = cluster.state()
    cluster.advance(2)
    at_four = cluster.state()
    other = made(
        {"c": {}, "d": {}},
        open_source=lambda directory: CheckpointSource(Path(directory)),
        open_moments=lambda directory: SavedMoments(Path(directory)),
    )
    other.move(split("c", "d"), base=None, step=2, origins=(), directory=str(tmp_path), moments=True)
    assert other.step == 2
    assert same(other.state(), at_two)
    other.advance(2)
    assert same(other.state(), at_four, atol=1e-12)


def test_moments_of_a_checkpoint_are_zeros_unless_asked_for(made: Any) -> None:
    cluster = made({"a": {}}, open_source=lambda _: SeededSource())
    cluster.move(ONE, base=None, step=0, origins=(), directory="anywhere")
    assert not any(tensor.any() for parts in cluster.state().values() for tensor in parts[2:])
    with pytest.raises(ProtocolError, match="cannot read moments of anywhere"):
        cluster.move(ONE, base=None, step=0, origins=(), directory="anywhere", moments=True)


def test_an_expert_that_is_nowhere_is_named(made: Any) -> None:
    cluster = made({**split("a", "b"), "c": {}})
    order = Assembly(epoch=1, experts={LAYERS[1]: ALL}, base=0, step=0, origins=cluster.origins("b"))
    lost = cluster.holding["b"][LAYERS[1]][0]
    with (
        cluster.client("c") as client,
        pytest.raises(ProtocolError, match=rf"finds expert {lost} of layer {LAYERS[1]} nowhere"),
    ):
        client.assemble(order)
    assert cluster.hosts["c"].epochs == (0,)


def test_a_repeat_does_nothing_and_another_order_is_refused(made: Any) -> None:
    cluster = made({**ONE, "b": {}})
    order = Assembly(epoch=1, experts=ONE["a"], base=0, step=0, origins=cluster.origins())
    with cluster.client("b") as client:
        client.assemble(order)
        version = cluster.hosts["b"].versions.held[1]
        client.assemble(order)
        assert cluster.hosts["b"].versions.held[1] is version
        with pytest.raises(ProtocolError, match="holds epoch 1 already"):
            client.assemble(Assembly(epoch=1, experts={}, base=0, step=0))
        client.retain(1)
        client.assemble(order)
        client.retain(1)
    assert cluster.hosts["b"].versions.current is version


def test_a_host_that_began_empty_takes_the_epoch_it_began_with(made: Any) -> None:
    cluster = made({"a": {}}, train=False, open_source=lambda _: SeededSource())
    with pytest.raises(ProtocolError, match=r"no experts of layer 1, only of \[\]"):
        cluster.hosts["a"].handle(Request(cluster.id(1, Phase.INFER)))
    with cluster.client("a") as client:
        client.assemble(Assembly(epoch=0, experts=ONE["a"], directory="x"))
        client.retain(0)
    cluster.holding = ONE
    assert len(cluster.infer()) == len(LAYERS)


@pytest.mark.parametrize("experts", [{0: (1,)}, {LAYERS[0]: (8,)}, {LAYERS[0]: (-1,)}, {LAYERS[0]: (1, 1)}])
def test_experts_that_the_model_lacks_are_refused(made: Any, experts: Any) -> None:
    host = made(ONE).hosts["a"]
    with pytest.raises(ProtocolError, match="has no experts"):
        host.assemble(Assembly(epoch=1, experts=experts, base=0, step=0))
    with pytest.raises(ProtocolError, match="has no experts"):
        next(host.fetch(Pull(experts=experts, base=0, step=0)))


def test_a_peer_that_dies_in_mid_fetch_leaves_the_host_as_it_was(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_stream, "FRAME_BYTES", 512)
    cluster = made({**ONE, "b": {}})
    cluster.advance()
    whole, closed = cluster.hosts["a"].fetch, threading.Event()

    def held_back(pull: Pull) -> Iterator[bytes]:
        frames = whole(pull)
        yield next(frames)
        assert closed.wait(20)
        yield from frames

    monkeypatch.setattr(cluster.hosts["a"], "fetch", held_back)

    class Dying(HostClient):
        def fetch(self, pull: Pull) -> Iterator[bytes]:
            frames = super().fetch(pull)
            yield next(frames)
            closing = threading.Thread(target=cluster.servers["a"].close)
            closing.start()
            try:
                yield from frames
            finally:
                closed.set()
                closing.join()

    host = cluster.add("c", {}, connect=Dying)
    order = Assembly(epoch=1, experts=ONE["a"], base=0, step=1, origins=cluster.origins())
    with pytest.raises(
        ChannelError, match=r"c could not pull expert \d of layer \d from expert host a"
    ) as caught:
        host.assemble(order)
    assert not isinstance(caught.value, RemoteError)
    assert (host.epochs, host.step, host.stats().experts) == ((0,), 0, {})
    with pytest.raises(ChannelError, match=r"expert 0 of layer 1 from expert host a: .*cannot be reached"):
        cluster.hosts["b"].assemble(order)


def test_what_a_peer_refuses_is_a_remote_error(made: Any) -> None:
    cluster = made({**ONE, "b": {}})
    origins = (Origin(host=cluster.info("b"), experts=ONE["a"]),)
    host = cluster.add("c", {})
    for base, why in ((0, "has no expert 0 of layer 1 in epoch 0"), (5, "holds epochs")):
        with pytest.raises(RemoteError, match=f"from expert host b: .*{why}"):
            host.assemble(Assembly(epoch=9, experts=ONE["a"], base=base, step=0, origins=origins))


def test_requests_are_answered_while_experts_come(made: Any) -> None:
    coming, go_on = threading.Event(), threading.Event()

    class Slow(HostClient):
        def fetch(self, pull: Pull) -> Iterator[bytes]:
            coming.set()
            assert go_on.wait(20)
            return super().fetch(pull)

    cluster = made(split("a", "b"), train=False, connect=Slow)
    before = cluster.infer()
    order = Assembly(epoch=1, experts=ONE["a"], base=0, origins=cluster.origins("a"))
    thread = threading.Thread(target=cluster.hosts["a"].assemble, args=(order,))
    thread.start()
    assert coming.wait(20)
    assert all(torch.equal(x, y) for x, y in zip(before, cluster.infer(), strict=True))
    with pytest.raises(StaleEpoch):  # not half of it
        cluster.hosts["a"].handle(Request(cluster.id(LAYERS[0], Phase.INFER)._replace(epoch=1)))
    cluster.hosts["a"].retain(0)  # no peer needs it any more
    go_on.set()
    thread.join()
    assert cluster.hosts["a"].epochs == (0, 1)


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
