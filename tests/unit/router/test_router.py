from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from actors.router import Router
from channels.base import Phase, Request
from errors import ChannelError, ProtocolError, RemoteError, StaleEpoch
from model.experts.protocols import Experts
from support.tiny_cluster import CONFIG, LAYERS, SETTINGS, TinyCluster, local_experts, tokens

EXACT = {"rtol": 0.0, "atol": 1e-12}


def through(experts: Experts, rows: Tensor, idx: Tensor, gates: Tensor) -> Tensor:
    """Two MoE layers, with a computation while the tokens are at the hosts."""
    for layer in LAYERS:
        pending = experts.dispatch(layer, rows, idx, gates)
        shared = torch.tanh(rows)
        rows = pending.combine() + shared
    return rows


@pytest.mark.parametrize("n_hosts", [1, 2, 3, 4, 5, 8])
def test_forward_and_backward_equal_local_experts(n_hosts: int) -> None:
    cluster, oracle = TinyCluster(n_hosts), local_experts()
    results = []
    for experts in (oracle, cluster.lane()):
        rows, idx, gates = tokens(17, grad=True)
        out = through(experts, rows, idx, gates)
        out.square().sum().backward()
        results.append((out.detach(), rows.grad, gates.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **EXACT)
    squared = sum(float(p.grad.square().sum()) for p in oracle.parameters() if p.grad is not None)
    assert cluster.commit(0) == pytest.approx(squared, rel=1e-12)
    optimizer = torch.optim.AdamW(
        oracle.parameters(), lr=1e-2, betas=(SETTINGS.beta1, SETTINGS.beta2), weight_decay=0.1
    )
    optimizer.step()
    for layer in LAYERS:
        for mine, theirs in zip(cluster.weights(layer), oracle.weights(layer), strict=True):
            torch.testing.assert_close(mine, theirs.detach(), **EXACT)
    assert all(host.stats().kept == 0 for host in cluster.hosts)


def test_without_gradient_hosts_keep_nothing() -> None:
    cluster = TinyCluster(2)
    rows, idx, gates = tokens(9, grad=True)
    with torch.no_grad():
        inferred = through(cluster.lane(), rows, idx, gates)
    torch.testing.assert_close(inferred, through(local_experts(), rows, idx, gates).detach(), **EXACT)
    assert [host.stats().kept for host in cluster.hosts] == [0, 0]
    assert cluster.hosts[0].stats().requests == {"INFER": 2}


def test_all_tokens_to_one_expert_and_hosts_without_tokens() -> None:
    cluster, oracle = TinyCluster(4), local_experts()
    grads = []
    for experts in (oracle, cluster.lane()):
        rows, _, _ = tokens(6, grad=True)
        idx = torch.full((6, 1), 5)
        gates = torch.ones(6, 1, dtype=torch.float64, requires_grad=True)
        experts.dispatch(LAYERS[0], rows, idx, gates).combine().square().sum().backward()
        grads.append((rows.grad, gates.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, **EXACT)
    assert sorted(host.stats().rows for host in cluster.hosts) == [0, 0, 0, 12]


def test_no_tokens_at_all() -> None:
    cluster = TinyCluster(2)
    rows, idx, gates = tokens(0, grad=True)
    out = cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine()
    out.sum().backward()
    assert out.shape == (0, CONFIG.hidden_size)
    assert rows.grad is not None and rows.grad.shape == rows.shape


def test_the_shared_work_runs_between_the_gradient_going_out_and_coming_back() -> None:
    cluster = TinyCluster(1)
    order: list[str] = []
    handle = cluster.hosts[0].handle

    def watched(request: Request) -> tuple[Tensor, ...]:
        order.append(request.id.phase.name)
        return handle(request)

    cluster.servers[0].handler = watched
    rows, idx, gates = tokens(5, grad=True)
    middle = rows * 1.0  # its gradient comes last
    middle.register_hook(lambda _: order.append("rows"))
    pending = cluster.lane().dispatch(LAYERS[0], middle, idx, gates)
    shared = torch.tanh(middle)
    shared.register_hook(lambda _: order.append("shared"))
    (pending.combine() + shared).sum().backward()
    assert order[0] == "FORWARD"
    assert order.index("BACKWARD") < order.index("rows")


def test_lanes_run_at_once_and_gradients_add_up() -> None:
    cluster, oracle = TinyCluster(2, lanes=2), local_experts()
    for microbatch in range(4):
        rows, idx, gates = tokens(11, seed=microbatch, grad=True)
        through(oracle, rows, idx, gates).square().sum().backward()

    def run(lane_index: int) -> None:
        lane = cluster.router.lane(lane_index)
        for microbatch in (2 * lane_index, 2 * lane_index + 1):
            lane.begin(0, microbatch)
            rows, idx, gates = tokens(11, seed=microbatch, grad=True)
            through(lane, rows, idx, gates).square().sum().backward()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    squared = sum(float(p.grad.square().sum()) for p in oracle.parameters() if p.grad is not None)
    assert cluster.commit(0) == pytest.approx(squared, rel=1e-12)


def test_counters_tell_hosts_per_token() -> None:
    cluster = TinyCluster(4)
    rows, idx, gates = tokens(10)
    cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine()
    holders = torch.tensor(cluster.holders[0])[:, 0]
    touched = sum(len(set(holders[row].tolist())) for row in idx)
    counters = cluster.router.counters()
    assert (counters.tokens, counters.rows) == (10, touched)
    sent = touched * CONFIG.hidden_size * 8 + 30 * (4 + 8) + (touched + 4) * 4
    assert counters.bytes == sent + touched * CONFIG.hidden_size * 8


def test_an_abandoned_forward_is_released() -> None:
    cluster = TinyCluster(2)
    lane = cluster.lane()
    rows, idx, gates = tokens(7, grad=True)
    through(lane, rows, idx, gates)
    lane.dispatch(LAYERS[0], rows, idx, gates)  # never combined
    assert all(host.stats().kept for host in cluster.hosts)
    lane.abandon()
    assert [host.stats().kept for host in cluster.hosts] == [0, 0]


def test_the_next_microbatch_releases_what_the_last_one_left() -> None:
    cluster = TinyCluster(2)
    lane = cluster.lane()
    rows, idx, gates = tokens(7, grad=True)
    through(lane, rows, idx, gates)
    lane.begin(0, 1)
    assert [host.stats().kept for host in cluster.hosts] == [0, 0]


def test_a_stale_epoch_before_a_step_is_routed_again() -> None:
    cluster = TinyCluster(2)
    for host in cluster.hosts:
        host.epoch = 1
    rows, idx, gates = tokens(7, grad=True)
    out = through(cluster.lane(), rows, idx, gates)
    out.sum().backward()
    torch.testing.assert_close(out, through(local_experts(), rows, idx, gates), **EXACT)
    assert cluster.router.table.epoch == 1


def test_a_stale_epoch_on_one_host_leaves_nothing_on_the_other() -> None:
    cluster = TinyCluster(2)
    cluster.hosts[1].epoch = 1
    handle = cluster.hosts[0].handle

    def adopts_late(request: Request) -> tuple[Tensor, ...]:
        if request.id.phase is Phase.RELEASE:
            cluster.hosts[0].epoch = 1
        return handle(request)

    cluster.servers[0].handler = adopts_late
    rows, idx, gates = tokens(7, grad=True)
    out = cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine()
    assert cluster.router.table.epoch == 1
    assert [host.stats().kept for host in cluster.hosts] == [1, 1]
    out.sum().backward()
    assert [host.stats().kept for host in cluster.hosts] == [0, 0]


def test_a_step_that_began_under_one_epoch_does_not_change_it() -> None:
    cluster = TinyCluster(2)
    lane = cluster.lane()
    rows, idx, gates = tokens(7, grad=True)
    lane.dispatch(LAYERS[0], rows, idx, gates).combine()
    for host in cluster.hosts:
        host.epoch = 1
    with pytest.raises(StaleEpoch, match=r"expert host host-0 \(local:"):
        lane.dispatch(LAYERS[1], rows, idx, gates).combine()
    with torch.no_grad():
        lane.dispatch(LAYERS[1], rows, idx, gates).combine()


def test_errors_name_the_host_and_other_replies_are_read() -> None:
    cluster = TinyCluster(2)
    rows, idx, gates = tokens(7)
    with pytest.raises(RemoteError, match=r"expert host host-0 \(local:.*torch.float32"):
        cluster.lane().dispatch(LAYERS[0], rows.float(), idx, gates).combine()
    cluster.servers[1].close()
    with pytest.raises(ChannelError, match="expert host host-1"):
        cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine()


def test_a_layer_without_experts_is_refused() -> None:
    rows, idx, gates = tokens(2)
    with pytest.raises(ProtocolError, match=r"layer 0 has no routed experts; these have: \[1, 2\]"):
        TinyCluster(1).lane().dispatch(0, rows, idx, gates)


def test_a_table_of_another_model_is_refused() -> None:
    cluster = TinyCluster(2)
    table = cluster.table(0)
    shorter = type(table)(epoch=0, hosts=table.hosts, holders=table.holders[:1])
    with pytest.raises(ProtocolError, match="has 1 layers, the model 2"):
        Router("r", "run", CONFIG, shorter, cluster.connect)
