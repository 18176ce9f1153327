from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.host import ExpertHost, HostSettings, InitialExperts
from channels.base import Phase, Request, RequestId
from errors import ProtocolError, RaymoeError, StaleEpoch
from model.experts.grouped_swiglu import experts_forward
from support.tiny_cluster import CONFIG, LAYERS, SETTINGS, SeededSource, TinyCluster, tokens

LAYER = LAYERS[0]


@pytest.fixture
def host() -> ExpertHost:
    return TinyCluster(1).hosts[0]


def request_id(phase: Phase, **changes: object) -> RequestId:
    base = RequestId(run="run", epoch=0, step=0, microbatch=0, layer=LAYER, phase=phase, router="worker-0")
    return base._replace(**changes)


def forward(n: int = 5, phase: Phase = Phase.FORWARD, seed: int = 0, **changes: object) -> Request:
    rows, idx, gates = tokens(n, seed)
    row_ptr = torch.arange(0, idx.numel() + 1, idx.shape[1], dtype=torch.int32)
    return Request(
        id=request_id(phase, **changes),
        tensors=(rows, row_ptr, idx.reshape(-1).int(), gates.reshape(-1)),
    )


def backward(n: int = 5, seed: int = 9, **changes: object) -> Request:
    return Request(id=request_id(Phase.BACKWARD, **changes), tensors=(tokens(n, seed)[0],))


def gradients(host: ExpertHost) -> list[Tensor]:
    return [gradient.clone() for gradient in host.gradients()]


def test_a_repeated_backward_adds_once_and_answers_the_same(host: ExpertHost) -> None:
    host.handle(forward())
    first = host.handle(backward())
    once = gradients(host)
    again = host.handle(backward())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(host), strict=True))
    assert any(gradient.any() for gradient in once)


def test_a_forward_after_its_backward_is_never_applied_again(host: ExpertHost) -> None:
    host.handle(forward())
    first = host.handle(backward())
    once = gradients(host)
    host.handle(forward())
    again = host.handle(backward())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    host.handle(forward(layer=LAYERS[1]))  # acknowledges the reply of the backward
    host.handle(forward())
    with pytest.raises(ProtocolError, match="was applied and its reply acknowledged"):
        host.handle(backward())
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(host), strict=True))


def test_a_repeated_forward_replaces_and_keeps_one(host: ExpertHost) -> None:
    first = host.handle(forward())
    assert torch.equal(first[0], host.handle(forward())[0])
    assert host.stats().kept == 1
    assert host.stats().kept_bytes > 0


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_late_repeat_acknowledges_nothing(host: ExpertHost, phase: Phase, layer: int) -> None:
    """Requests on a connection that a router has given up may come after later ones on another."""
    for at in LAYERS:
        host.handle(forward(layer=at))
    host.handle(backward(layer=LAYERS[1]))
    first = host.handle(backward(layer=LAYERS[0]))
    once = gradients(host)
    if phase is Phase.FORWARD:
        host.handle(forward(layer=layer))
    elif layer == LAYERS[1]:
        with pytest.raises(ProtocolError, match="was applied and its reply acknowledged"):
            host.handle(backward(layer=layer))
    again = host.handle(backward(layer=LAYERS[0]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(host), strict=True))
    assert host.stats().kept == 0


def test_a_late_forward_of_a_layer_still_to_come_acknowledges_nothing(host: ExpertHost) -> None:
    for at in LAYERS:
        host.handle(forward(layer=at))
    first = host.handle(backward(layer=LAYERS[1]))
    host.handle(forward(layer=LAYERS[0]))
    again = host.handle(backward(layer=LAYERS[1]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert host.stats().kept == 1


def test_lanes_do_not_acknowledge_each_other(host: ExpertHost) -> None:
    host.handle(forward())
    first = host.handle(backward())
    host.handle(forward(microbatch=1))
    host.handle(forward(router="worker-1"))
    assert torch.equal(host.handle(backward())[0], first[0])


def test_two_threads_with_the_same_backward_add_once(host: ExpertHost) -> None:
    host.handle(forward())
    host.handle(backward())
    once = gradients(host)
    other = TinyCluster(1).hosts[0]
    other.handle(forward())
    start = threading.Barrier(4)

    def call() -> None:
        start.wait()
        other.handle(backward())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.stats().requests["BACKWARD"] == 1
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(other), strict=True))


def test_release_and_infer_keep_nothing(host: ExpertHost) -> None:
    inferred = host.handle(forward(phase=Phase.INFER))
    assert host.stats().kept == 0
    kept = host.handle(forward())
    torch.testing.assert_close(inferred[0], kept[0], rtol=1e-12, atol=1e-12)
    assert host.handle(Request(id=request_id(Phase.RELEASE))) == ()
    assert host.handle(Request(id=request_id(Phase.RELEASE))) == ()
    assert host.stats().kept == 0
    with pytest.raises(ProtocolError, match="has no FORWARD"):
        host.handle(backward())


def test_a_stale_epoch_is_refused_with_the_new_one(host: ExpertHost) -> None:
    host.epoch = 4
    with pytest.raises(StaleEpoch) as caught:
        host.handle(forward())
    assert caught.value.epoch == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r._replace(tensors=r.tensors[:3]), "carries 3 tensors instead of 4"),
        (lambda r: r._replace(tensors=(r.tensors[0].float(), *r.tensors[1:])), "torch.float32"),
        (lambda r: r._replace(tensors=(r.tensors[0][:, :3], *r.tensors[1:])), r"not \[5, 3\]"),
        (lambda r: r._replace(id=r.id._replace(layer=0)), r"no experts of layer 0, only of \[1, 2\]"),
        (lambda r: r._replace(id=r.id._replace(step=2)), "asks for step 2 .* is at step 0"),
        (
            lambda r: r._replace(tensors=(*r.tensors[:2], r.tensors[2] + 8, r.tensors[3])),
            "does not hold experts",
        ),
        (lambda r: r._replace(tensors=(r.tensors[0], r.tensors[1][:-1], *r.tensors[2:])), "row_ptr"),
    ],
)
def test_a_malformed_request_says_what_is_wrong(
    host: ExpertHost, change: Callable[[Request], Request], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        host.handle(change(forward()))
    assert host.stats().kept == 0


def test_what_is_written_to_a_request_after_its_check_does_not_count(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = host.handle(forward(phase=Phase.INFER))[0]
    request = forward(phase=Phase.INFER)

    def late(*arguments: Any, keep: bool) -> Any:
        request.tensors[1].fill_(1 << 20)
        request.tensors[2].fill_(1 << 20)
        return experts_forward(*arguments, keep=keep)

    monkeypatch.setattr("actors.host.request_execution.experts_forward", late)
    assert torch.equal(host.handle(request)[0], expected)


def test_a_foreign_expert_is_named() -> None:
    host = TinyCluster(2).hosts[1]
    with pytest.raises(ProtocolError, match=r"host-1 does not hold experts \[.*\] of layer 1; it holds 4"):
        host.handle(forward())


def test_prepare_returns_the_squared_norm(host: ExpertHost) -> None:
    assert host.prepare(0) == 0.0
    other = TinyCluster(1).hosts[0]
    other.handle(forward())
    other.handle(backward())
    expected = sum(float(gradient.square().sum()) for gradient in other.gradients())
    assert other.prepare(0) == pytest.approx(expected, rel=1e-12)


def test_a_sealed_step_takes_no_gradient(host: ExpertHost) -> None:
    host.handle(forward())
    host.handle(forward(microbatch=1))
    first = host.handle(backward())
    host.prepare(0)
    with pytest.raises(ProtocolError, match="sealed"):
        host.handle(backward(microbatch=1))
    assert torch.equal(host.handle(backward())[0], first[0])


def test_commits_are_idempotent_and_in_order(host: ExpertHost) -> None:
    with pytest.raises(ProtocolError, match="without a prepare"):
        host.commit(0, 1e-2, 1.0)
    host.handle(forward())
    host.handle(backward())
    host.handle(forward(microbatch=1))
    host.prepare(0)
    with pytest.raises(ProtocolError, match="at step 0, not at step 1"):
        host.commit(1, 1e-2, 1.0)
    host.commit(0, 1e-2, 1.0)
    after = [w13.clone() for _, _, w13, _ in host.weights()]
    host.commit(0, 1e-2, 1.0)
    assert all(torch.equal(a, b) for a, (_, _, b, _) in zip(after, host.weights(), strict=True))
    assert host.step == 1
    assert host.stats().kept == 0, "a step's activations outlive it"
    assert not any(gradient.any() for gradient in host.gradients())
    with pytest.raises(ProtocolError):
        host.prepare(0)
    with pytest.raises(ProtocolError, match="at step 1"):
        host.handle(forward())


def test_commands_of_another_epoch_change_nothing(host: ExpertHost) -> None:
    """A coordinator that has been replaced may have sent such commands."""
    for late in (
        lambda: host.prepare(0, epoch=7),
        lambda: host.commit(0, 1e-2, 1.0, epoch=7),
        lambda: host.snapshot(0, [], epoch=7),
    ):
        with pytest.raises(ProtocolError, match="trains in epoch 0, not in 7"):
            late()
    host.handle(forward())
    host.handle(backward())  # the step is not sealed
    host.prepare(0, epoch=0)
    host.commit(0, 1e-2, 1.0, epoch=0)
    assert host.step == 1


def test_a_request_of_the_next_step_waits_for_the_commit(host: ExpertHost) -> None:
    host.handle(forward())
    host.handle(backward())
    replies: list[Tensor] = []
    early = threading.Thread(target=lambda: replies.append(host.handle(forward(step=1))[0]))
    early.start()
    host.prepare(0)
    assert not replies
    host.commit(0, 1e-2, 1.0)
    early.join(20)
    torch.testing.assert_close(
        replies[0], host.handle(forward(step=1, phase=Phase.INFER))[0], rtol=1e-12, atol=1e-12
    )
    assert host.stats().kept == 1, "the commit dropped an activation of the next step"


def test_an_expert_without_tokens_decays(host: ExpertHost) -> None:
    before = {(layer, expert): w13.clone() for layer, expert, w13, _ in host.weights()}
    host.prepare(0)
    host.commit(0, 1e-2, 1.0)
    for layer, expert, w13, _ in host.weights():
        assert torch.allclose(
            w13, before[layer, expert] * (1 - 1e-2 * SETTINGS.weight_decay), rtol=1e-14, atol=0
        )


def test_a_failed_commit_wakes_the_waiting_and_stays_failed(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.prepare(0)
    errors: list[Exception] = []

    def call() -> None:
        try:
            host.handle(forward(step=1))
        except RaymoeError as error:
            errors.append(error)

    early = threading.Thread(target=call)
    early.start()

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("model.optimizers.adamw.AdamW.step", broken)
    with pytest.raises(RuntimeError):
        host.commit(0, 1e-2, 1.0)
    early.join(20)
    assert "failed in the commit of step 0: no memory" in str(errors[0])
    with pytest.raises(RaymoeError, match="no memory"):
        host.prepare(0)


def test_a_host_without_optimizer_infers_at_any_step() -> None:
    host = TinyCluster(1, train=False).hosts[0]
    host.handle(forward(phase=Phase.INFER, step=77))
    with pytest.raises(ProtocolError, match="holds no optimizer"):
        host.handle(forward())


def test_any_placement_loads_the_same_weights() -> None:
    one, three = TinyCluster(1), TinyCluster(3)
    for layer in LAYERS:
        for a, b in zip(one.weights(layer), three.weights(layer), strict=True):
            assert torch.equal(a, b)
    assert sum(host.stats().parameters for host in three.hosts) == one.hosts[0].stats().parameters


def test_threads_are_set_once() -> None:
    before = torch.get_num_threads()
    try:
        ExpertHost(
            "host-0",
            CONFIG,
            InitialExperts(source=SeededSource(), experts={LAYER: (0,)}),
            settings=HostSettings(threads=before + 1),
        )
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
