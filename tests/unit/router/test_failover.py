"""Calls survive lost hosts, by replicas, a newer table or another connection, or fail with a reason."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.messages.transfer_orders import Assembly
from actors.router import Router
from cluster.topology import RoutingTable, experts_held
from errors import ChannelError, RaymoeError, RemoteError
from support.coordinator_tables import check
from support.fakes.failing_hosts import KINDS, LONG, REMOTE, FailingHost, FailoverCluster
from support.tiny_cluster import CONFIG, LAYERS, SeededSource, local_experts, tokens
from support.waiting import wait_until

EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_is_gone_is_gone_around(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready()
    cluster.sites[1].server.close()
    check(lane)
    assert cluster.tables.suspects == ["host-1"]
    assert [host.id for host in cluster.routers[0].routing.host_map.hosts] == ["host-0", "host-2"]
    check(lane)
    assert cluster.tables.suspects == ["host-1"]


@pytest.mark.parametrize("kind", REMOTE)
def test_a_host_that_dies_over_a_call_is_gone_around(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready()
    cluster.sites[1].dies()
    check(lane)
    assert cluster.tables.suspects == ["host-1"]


@pytest.mark.parametrize("kind", REMOTE)
def test_a_host_that_never_answers_is_gone_around(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready(timeout=0.3)
    cluster.sites[0].silent.set()
    check(lane)
    assert cluster.tables.suspects == ["host-0"]
    cluster.sites[0].go_on.set()  # its late answers are dropped
    for seed in range(4):
        check(lane, seed)


@pytest.mark.parametrize("kind", REMOTE)
def test_the_watch_ends_the_wait_for_a_hung_host(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready(watch=True)
    cluster.sites[2].silent.set()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(check, lane)
        assert cluster.sites[2].held.wait(LONG)
        assert not waiting.done()
        cluster.tables.publish(cluster.without(2))
        waiting.result()
    assert cluster.routers[0].table.serial == 1
    assert cluster.tables.suspects == []  # the coordinator knows
    check(lane)


@pytest.mark.parametrize("kind", KINDS)
def test_several_hosts_are_lost(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 4, 3)
    lane = cluster.ready()
    for at in (0, 1):
        cluster.sites[at].server.close()
    check(lane)
    assert sorted(cluster.tables.suspects) == ["host-0", "host-1"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_replica_the_error_names_the_host(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 2, 1)
    lane = cluster.ready()
    cluster.sites[1].server.close()
    for _ in range(2):
        with pytest.raises(ChannelError, match="expert host host-1"):
            check(lane)
    lane.abandon()


@pytest.mark.parametrize("kind", KINDS)
def test_patience_has_an_end(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready(patience=2.0)
    for at in (0, 1):  # all that hold the first group
        cluster.sites[at].server.close()
    with pytest.raises(ChannelError, match="expert host host-"):
        check(lane)
    assert len(cluster.tables.asked) > 1
    lane.abandon()


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_table_heals(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 2, 1)
    lane = cluster.ready(patience=LONG)
    cluster.sites[1].server.close()
    # Its experts have been loaded by another host, in another epoch.
    spare = ExpertHost(
        "host-9",
        CONFIG,
        InitialExperts(source=SeededSource(), experts=experts_held(cluster.holders, LAYERS, 1), epoch=1),
        settings=HostSettings(dtype=torch.float64),
    )
    keeps = experts_held(cluster.holders, LAYERS, 0)
    cluster.hosts[0].assemble(Assembly(epoch=1, experts=keeps, base=0))
    cluster.sites.append(FailingHost(spare, cluster.kind))
    hosts = (cluster.infos[0], cluster.sites[-1].info)

    cluster.tables.asked.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(check, lane)
        wait_until(lambda: len(cluster.tables.asked) > 0)
        assert not waiting.done()
        cluster.tables.publish(RoutingTable(epoch=1, hosts=hosts, holders=cluster.holders, serial=2))
        waiting.result()
    assert cluster.routers[0].routing.host_map.epoch == 1
    check(lane)


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_drops_is_made_anew(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 2, 1)
    lane = cluster.ready(patience=LONG)
    for seed in range(3):
        lane.connections.channel(cluster.infos[1]).close()
        check(lane, seed)
    # A mailbox needs no connection, until the host sees that there is none.
    assert cluster.tables.suspects == ["host-1"] * 3 or kind == "mail"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_no_loss(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 2, 2)
    lane = cluster.ready(patience=LONG)

    def fails() -> None:
        raise RaymoeError("no arithmetic today")

    for site in cluster.sites:
        site.before = fails
    with pytest.raises(RemoteError, match="no arithmetic today"):
        check(lane)
    lane.abandon()
    assert cluster.tables.suspects == []
    for site in cluster.sites:
        site.before = lambda: None
    check(lane)


def test_only_calls_that_want_an_expert_wait_for_its_host(made: Callable[..., FailoverCluster]) -> None:
    cluster = made("local", 2, 1)
    cluster.tables.table = cluster.without(1)
    router = Router("r", "run", CONFIG, cluster.tables.table, cluster.connect, tables=cluster.tables)
    lane, oracle = router.lane(0), local_experts()
    rows, idx, gates = tokens(3)
    here = [e for e, hosts in enumerate(cluster.holders[0]) if hosts == (0,)]
    idx[:] = torch.tensor(here[: idx.shape[1]])
    with torch.no_grad():
        expected = oracle.dispatch(LAYERS[0], rows, idx, gates).combine()
    torch.testing.assert_close(lane.dispatch(LAYERS[0], rows, idx, gates).combine(), expected, **EXACT)
    idx[0, 0] = next(e for e, hosts in enumerate(cluster.holders[0]) if hosts == (1,))
    with pytest.raises(ChannelError, match="no live expert host holds"):
        lane.dispatch(LAYERS[0], rows, idx, gates)
    router.routing.patience = LONG
    cluster.tables.asked.clear()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        waiting = pool.submit(lambda: lane.dispatch(LAYERS[0], rows, idx, gates).combine())
        wait_until(lambda: len(cluster.tables.asked) > 0)
        cluster.tables.publish(cluster.without(serial=2))
        expected = oracle.dispatch(LAYERS[0], rows, idx, gates).combine()
        torch.testing.assert_close(waiting.result(), expected, **EXACT)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_slow_host_is_hedged_and_not_suspected(made: Callable[..., FailoverCluster], kind: str) -> None:
    cluster = made(kind, 3, 2)
    lane = cluster.ready(hedge_after=1.0)
    cluster.sites[0].silent.set()
    check(lane)
    assert cluster.tables.suspects == []
    cluster.sites[0].silent.clear()
    cluster.sites[0].go_on.set()
    check(lane)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_silent_host_is_left_although_another_one_is_shunned(
    made: Callable[..., FailoverCluster], kind: str
) -> None:
    """A busy machine makes one host late, so that calls shun it, and then the other replica hangs."""
    cluster = made(kind, 3, 2)
    lane = cluster.ready(hedge_after=1.0)
    cluster.routers[0].routing.shun(cluster.infos[1])
    cluster.sites[0].silent.set()
    check(lane)
    assert cluster.tables.suspects == []
