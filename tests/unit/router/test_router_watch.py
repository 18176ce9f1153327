"""The watch of routing tables, connections and waits that end, and who computes while all hosts are well."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from actors.router.call_context import ReplicaShifts
from channels.base import Channel
from cluster.topology import HostInfo
from errors import ChannelError, ChannelTimeout
from support.coordinator_tables import check
from support.fakes.failing_hosts import LONG, REMOTE, FailoverCluster
from support.tiny_cluster import LAYERS, TinyCluster, tokens
from support.waiting import wait_until


@pytest.mark.parametrize("kind", ["local", "mail"])
def test_one_token_at_a_time_splits_evenly(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 2, 2)
    lane = cluster.ready()
    before = [host.stats().rows for host in cluster.hosts]
    _, idx, _ = tokens(1)
    idx[:] = torch.tensor([e for e, hosts in enumerate(cluster.holders[0]) if hosts[0] == 0][: idx.shape[1]])
    with torch.no_grad():
        for seed in range(300):
            rows, _, gates = tokens(1, seed)
            lane.begin(seed, 0)
            for layer in LAYERS:
                lane.dispatch(layer, rows, idx, gates).combine()
    split = [host.stats().rows - was for host, was in zip(cluster.hosts, before, strict=True)]
    assert sum(split) == 600
    assert abs(split[0] - split[1]) < 30


def test_every_layer_takes_turns_whatever_their_number() -> None:
    chosen = ReplicaShifts()
    shifts = [chosen.next() for _ in range(12 * 2000)]
    for layers in range(1, 13):
        for ways in (1, 2, 3, 4, 6, 12):
            taken = Counter(shift % ways for shift in shifts[::layers])
            even = len(shifts[::layers]) / ways
            assert all(abs(taken[way] - even) < 0.1 * even for way in range(ways)), (layers, ways, taken)


@pytest.mark.parametrize("silence", ["nothing new", "away", "stale"])
def test_the_watch_neither_spins_nor_outlives_its_router(
    made: Callable[..., FailoverCluster], silence: str
) -> None:
    cluster = made("local", 2, 2)
    tables = cluster.tables
    tables.away = silence == "away"
    tables.changed.wait_for = lambda *_: True  # type: ignore[method-assign]
    if silence == "stale":
        after = tables.after
        tables.after = lambda *call: after(*call) or tables.table  # type: ignore[method-assign]
    before = set(threading.enumerate())
    lane = cluster.ready(watch=True)
    (thread,) = (one for one in set(threading.enumerate()) - before if one.name.startswith("watch-"))
    wait_until(lambda: len(tables.asked) >= 5)
    assert min(later - earlier for earlier, later in pairwise(tables.asked)) > 0.2
    if silence == "away":  # it goes on when the coordinator is back
        tables.away = False
        tables.publish(cluster.without(1))
        wait_until(lambda: cluster.routers[0].table.serial == 1)
        check(lane)
    cluster.routers[0].close()
    thread.join(10)
    assert not thread.is_alive()


def test_connecting_to_a_host_that_goes_is_given_up(made: Callable[..., FailoverCluster]) -> None:
    cluster = made("local", 3, 2)
    lane = cluster.ready(watch=True)
    lane.close()
    begun, hung, connect = threading.Event(), threading.Event(), cluster.connect

    def connecting(host: HostInfo) -> Channel:
        if host.id == "host-1":
            begun.set()
            hung.wait(LONG)
        return connect(host)

    cluster.connect = connecting  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(check, lane)
        assert begun.wait(LONG)
        cluster.tables.publish(cluster.without(1))
        waiting.result()
    hung.set()


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("end", ["cut", "close"])
def test_a_wait_ends_when_another_thread_ends_the_channel(
    made: Callable[..., FailoverCluster], kind: str, end: str
) -> None:
    cluster = made(kind, 1, 1)
    lane = cluster.ready()
    site = cluster.sites[0]
    site.silent.set()
    pending = lane.dispatch(LAYERS[0], *tokens(12))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pending.combine)
        assert site.held.wait(LONG)
        assert not waiting.done()
        channel = lane.connections.channel(cluster.infos[0])
        channel.cut("enough") if end == "cut" else channel.close()
        with pytest.raises(ChannelError) as caught:
            waiting.result()
    assert not isinstance(caught.value, ChannelTimeout)


def test_training_stays_with_its_hosts() -> None:
    cluster = TinyCluster(3, replicas=2)
    cluster.servers[1].close()
    rows, idx, gates = tokens(9, grad=True)
    with pytest.raises(ChannelError, match="expert host host-1"):
        cluster.lane().dispatch(LAYERS[0], rows, idx, gates).combine()
    primary = torch.tensor(cluster.holders[0])[:, 0][idx]
    for at in (0, 2):
        expected = int((primary == at).any(1).sum())
        assert cluster.hosts[at].stats().rows in (0, expected)
