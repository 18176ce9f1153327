"""Expert hosts are lost thirty times in a row: no request fails, no answer changes.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator

import pytest

from actors.rpc.admin_client import AdminClient
from support.commands.losses import IN_A_ROW, request, wait_for_hosts, wait_for_trunks
from support.commands.serve import TWO_REPLICAS, ServeProcess, SharedServer
from support.commands.streams import HOST, StreamLoad, Told, actors, disturbed

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.shares("two replicas")]
STREAMS, TOKENS = 12, 160
REQUESTS = [request(index, TOKENS) for index in range(STREAMS)]
SETTINGS = {**TWO_REPLICAS, "cluster.dead_after": 1.0}


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(SETTINGS)


@pytest.fixture(scope="module")
def admin(server: ServeProcess) -> Iterator[AdminClient]:
    client = AdminClient(f"grpc:{server.coordinator}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def undisturbed(server: ServeProcess) -> list[Told]:
    wait_for_trunks(server)
    told = asyncio.run(StreamLoad(server, REQUESTS).run())
    assert all(reason == "length" for *_, reason in told)
    return told


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_expert_hosts_are_lost_in_a_row(
    server: ServeProcess, admin: AdminClient, undisturbed: list[Told], machine: str, how: signal.Signals
) -> None:
    gaps = []
    for seed in range(IN_A_ROW):
        wait_for_trunks(server)
        wait_for_hosts(admin, 3)
        source = random.Random(seed)
        at = source.randrange(STREAMS, STREAMS * TOKENS // 2)
        lost = source.choice(actors(server, HOST))
        load = StreamLoad(server, REQUESTS)
        asyncio.run(disturbed(load, at, lambda lost=lost: lost.send_signal(how)))  # type: ignore[misc]
        assert load.told == undisturbed
        gaps.append(load.gap)
        lost.wait(60)
    shown = ", ".join(f"{gap:.2f}" for gap in sorted(gaps))
    print(f"{how.name} to an expert host, {machine}, {IN_A_ROW} times: longest gaps {shown} s")
