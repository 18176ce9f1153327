"""Calls survive lost hosts, by replicas, a newer table or another connection, or fail with a reason."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.messages.transfer_orders import Assembly
from actors.router import Router, RouterSettings
from actors.router.call_context import ReplicaShifts
from actors.router.lane import Lane
from actors.router.mailbox_call import MailboxCall
from channels import choose, local
from channels.base import Channel, Request
from channels.collective import channel as collective
from channels.grpc import channel as grpc
from channels.shm import channel as shm
from channels.shm.mailbox import HostMailbox
from cluster import HostInfo, RoutingTable, experts_held
from errors import ChannelError, ChannelTimeout, RaymoeError, RemoteError
from support.coordinator_tables import FakeTables, check
from support.tiny_cluster import CONFIG, LAYERS, SeededSource, TinyCluster, local_experts, tokens
from support.waiting import wait_until

EXACT = {"rtol": 0.0, "atol": 1e-12}
KINDS = ["local", "shm", "mail", "collective", "grpc"]
REMOTE = KINDS[1:]  # whose peers can be silent; a call within a process ends when it returns
LONG = 600.0
"""Seconds, more than the time limit of a test: a test that ends has not waited for what takes as long."""


class FailingHost:
    """A host whose failures a test chooses."""

    def __init__(self, host: ExpertHost, kind: str) -> None:
        self.host = host
        self.before: Callable[[], None] = lambda: None
        self.silent = threading.Event()
        self.held = threading.Event()  # a request waits at the silent host
        self.go_on = threading.Event()
        if kind == "local":
            self.server: Any = local.serve(self.handle)
        elif kind == "grpc":
            self.server = grpc.serve(self.handle)
        elif kind == "collective":
            self.server = collective.serve(self.handle)
        else:
            self.server = shm.serve(self.handle, self.answer if kind == "mail" else None)
        self.info = HostInfo(id=host.id, addresses={"any": self.server.address})

    def handle(self, request: Request) -> tuple[Tensor, ...]:
        self._maybe_fail()
        return self.host.handle(request)

    def answer(self, box: HostMailbox) -> None:
        try:
            self._maybe_fail()
        except RaymoeError:
            box.reply(answered=False)
            return
        self.host.answer(box)

    def _maybe_fail(self) -> None:
        self.before()
        if self.silent.is_set():
            self.held.set()
            self.go_on.wait(LONG)

    def dies(self) -> None:
        """Close the server at the next request, which is not answered."""

        def dying() -> None:
            self.before = lambda: None
            threading.Thread(target=self.server.close, daemon=True).start()
            self.go_on.wait(0.3)  # the request is not answered before that

        self.before = dying


class FailoverCluster(TinyCluster):
    """Hosts of one kind of channel."""

    def __init__(self, kind: str, n_hosts: int, replicas: int) -> None:
        super().__init__(n_hosts, train=False, replicas=replicas)
        self.kind = kind
        self.sites = [FailingHost(host, kind) for host in self.hosts]
        self.infos = tuple(site.info for site in self.sites)
        self.tables = FakeTables(self.table(0))
        self.routers: list[Router] = []

    def connect(self, host: HostInfo) -> Channel:
        return choose.connect(host.addresses["any"], timeout=2.0)

    def ready(self, **settings: Any) -> Lane:
        """A lane that has made a call, through mailboxes if that is the kind."""
        router = Router(
            "replica",
            "run",
            CONFIG,
            self.tables.table,
            lambda host: self.connect(host),  # which a test may replace
            RouterSettings(**{"timeout": LONG, **settings}),
            tables=self.tables,
        )
        self.routers.append(router)
        lane = router.lane(0)
        local_experts().dispatch(LAYERS[0], *tokens(12)).combine()  # compiled before anything is timed
        while True:
            pending = lane.dispatch(LAYERS[0], *tokens(12))
            pending.combine()
            if self.kind != "mail" or isinstance(pending, MailboxCall):
                return lane

    def without(self, *lost: int, serial: int = 1) -> RoutingTable:
        """The table of the same epoch without some hosts."""
        left = [at for at in range(len(self.infos)) if at not in lost]
        return RoutingTable(
            epoch=0,
            hosts=tuple(self.infos[at] for at in left),
            holders=tuple(
                tuple(tuple(left.index(at) for at in hosts if at in left) for hosts in row)
                for row in self.holders
            ),
            serial=serial,
        )

    def close(self) -> None:
        for site in self.sites:
            site.go_on.set()
        for router in self.routers:
            router.close()
        for site in self.sites:
            site.server.close()


@pytest.fixture(autouse=True)
def _a_busy_machine_lets_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avoid a lost host for as long as a test takes, however slow the machine is."""
    monkeypatch.setattr("actors.router.routing._SHUNNED", 600.0)


@pytest.fixture
def made() -> Iterator[Callable[..., FailoverCluster]]:
    clusters: list[FailoverCluster] = []

    def make(kind: str, n_hosts: int, replicas: int) -> FailoverCluster:
        clusters.append(FailoverCluster(kind, n_hosts, replicas))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


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
    lane = cluster.ready(patience=0.5)
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
    lane = cluster.ready(hedge_after=0.2)
    cluster.sites[0].silent.set()
    check(lane)
    assert cluster.tables.suspects == []
    cluster.sites[0].silent.clear()
    cluster.sites[0].go_on.set()
    check(lane)


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
