"""Hosts whose processes are stopped: they keep every connection and answer nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest

from actors.host.host_server import ExpertHostServer
from actors.router import Router, RouterSettings
from actors.router.mailbox_call import MailboxCall
from benchmarks.contenders import host_process, until_closed
from channels import choose
from cluster.topology import HostInfo, RoutingTable
from support.coordinator_tables import FakeTables, check
from support.tiny_cluster import CONFIG, LAYERS, TinyCluster, local_experts, tokens
from support.waiting import wait_until

pytestmark = pytest.mark.slow

HOSTS = 3


def serve(_: dict[str, Any], index: int, pipe: Connection) -> None:
    until_closed(ExpertHostServer(TinyCluster(HOSTS, train=False, replicas=2).hosts[index]), pipe)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[HostInfo, ...]]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(host_process(serve, {}, index)) for index in range(HOSTS))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["shm", "collective", "grpc"])
def test_calls_go_on_as_soon_as_the_coordinator_says_so(hosts: tuple[HostInfo, ...], kind: str) -> None:
    holders = TinyCluster(HOSTS, train=False, replicas=2).holders
    table = RoutingTable(epoch=0, hosts=hosts, holders=holders)
    tables = FakeTables(table)
    left = tuple(tuple(tuple(at for at in row if at != 2) for row in layer) for layer in holders)
    router = Router(
        "replica",
        "run",
        CONFIG,
        table,
        lambda host: choose.connect(host.addresses[kind]),
        RouterSettings(timeout=600.0, watch=True),
        tables=tables,
    )
    lane = router.lane(0)
    for experts in (local_experts(), lane):  # all is compiled before anything is timed
        experts.dispatch(LAYERS[0], *tokens(40)).combine()
    while True:
        pending = lane.dispatch(LAYERS[0], *tokens(12))
        pending.combine()
        if kind != "shm" or isinstance(pending, MailboxCall):
            break
    check(lane)
    os.kill(hosts[2].pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(check, lane)
            with pytest.raises(TimeoutError):  # it waits for the host that is stopped
                waiting.result(0.5)
            tables.publish(RoutingTable(epoch=0, hosts=hosts[:2], holders=left, serial=1))
            waiting.result()
        check(lane)
    finally:
        os.kill(hosts[2].pid, signal.SIGCONT)
    tables.publish(replace(table, serial=2))  # it is back
    wait_until(lambda: router.table.serial == 2)
    for seed in range(4):
        check(lane, seed)
    assert lane.connections.reaches(hosts[2])
    assert tables.suspects == []
    router.close()
