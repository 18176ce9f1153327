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
from actors.messages.transfer_orders import Assembly, Origin, Pull
from actors.rpc.host_client import HostClient
from channels.base import Phase, Request
from errors import ChannelError, ProtocolError, RemoteError, StaleEpoch
from support.moving_cluster import ALL, ONE, CheckpointSource, same, split
from support.tiny_cluster import LAYERS, SeededSource


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
