"""Expert hosts die, hang, join and leave under running streams: no request fails, no answer changes.

The figures that these tests print are in docs/operations.md.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.rpc.admin_client import AdminClient
from errors import ConfigError, RaymoeError
from support.commands.losses import wait_for_hosts
from support.commands.serve import TWO_REPLICAS, ServeProcess, SharedServer, running, save_model, tiny_model
from support.commands.streams import COORDINATOR, HOST, StreamLoad, Told, actors, disturbed, greedy_requests
from support.waiting import wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.shares("two replicas")]
STREAMS, TOKENS = 16, 120
HOSTS = 3  # of TWO_REPLICAS
REQUESTS = greedy_requests(STREAMS, TOKENS)


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(TWO_REPLICAS)


@pytest.fixture(scope="module")
def admin(server: ServeProcess) -> Iterator[AdminClient]:
    client = AdminClient(f"grpc:{server.coordinator}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def undisturbed(server: ServeProcess) -> list[Told]:
    told = asyncio.run(StreamLoad(server, REQUESTS).run())
    assert all(reason == "length" for *_, reason in told)
    return told


def under_load(
    server: ServeProcess, undisturbed: list[Told], disturb: Callable[[], object], at: int
) -> StreamLoad:
    """Run the streams, disturb them after `at` chunks, and assert that no answer changes."""
    load = asyncio.run(disturbed(StreamLoad(server, REQUESTS), at, disturb))
    assert load.told == undisturbed
    return load


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_host_costs_nothing_but_time(
    server: ServeProcess, admin: AdminClient, undisturbed: list[Told], seed: int
) -> None:
    wait_for_hosts(admin, HOSTS)
    source = random.Random(seed)
    at = source.randrange(STREAMS, STREAMS * TOKENS // 2)
    before = deaths(admin)
    load = under_load(server, undisturbed, lambda: source.choice(actors(server, HOST)).kill(), at)
    print(f"killed after {at} chunks: longest gap {load.gap:.2f} s")
    wait_until(lambda: deaths(admin) == before + 1, what=admin.status)  # the streams may end before
    wait_for_hosts(admin, HOSTS)


def deaths(admin: AdminClient) -> int:
    """Deaths of expert hosts so far."""
    told = [(event["kind"], event["text"]) for event in admin.status()["events"]]
    return sum(kind == "died" and text.startswith("expert host") for kind, text in told)


def test_a_host_that_hangs_is_given_up(
    server: ServeProcess, admin: AdminClient, undisturbed: list[Told]
) -> None:
    wait_for_hosts(admin, HOSTS)
    hung = actors(server, HOST)[0]
    load = under_load(server, undisturbed, lambda: hung.send_signal(signal.SIGSTOP), STREAMS * 10)
    print(f"stopped: longest gap {load.gap:.2f} s")
    wait_for_hosts(admin, HOSTS)
    hung.wait(60)  # it was killed and is not restarted


def test_a_killed_coordinator_is_not_missed(
    server: ServeProcess, admin: AdminClient, undisturbed: list[Told]
) -> None:
    before = wait_for_hosts(admin, HOSTS)
    load = under_load(server, undisturbed, lambda: actors(server, COORDINATOR)[0].kill(), STREAMS * 10)
    print(f"coordinator killed: longest gap {load.gap:.2f} s")
    after = settled_again(admin)
    assert [host["id"] for host in after["hosts"]] == [host["id"] for host in before["hosts"]]
    assert after["epoch"] == before["epoch"]
    load = under_load(server, undisturbed, lambda: actors(server, HOST)[0].kill(), STREAMS * 10)
    wait_for_hosts(admin, HOSTS)


def settled_again(admin: AdminClient) -> dict[str, Any]:
    """Wait for a coordinator that answers and for all hosts; return the status."""
    return wait_until(lambda: wait_for_hosts(admin, HOSTS), every=0.1, ignoring=RaymoeError)


def test_hosts_come_and_go_under_load(
    server: ServeProcess, admin: AdminClient, undisturbed: list[Told]
) -> None:
    wait_for_hosts(admin, HOSTS)
    for target in (2, 4, 1, 3):
        took: list[dict[str, Any]] = []

        def scale(target: int = target, took: list[dict[str, Any]] = took) -> None:
            took.append(admin.scale(target))

        load = under_load(server, undisturbed, scale, STREAMS * 10)
        assert took[0]["done"]
        status = wait_for_hosts(admin, target)
        wait_until(lambda: len(actors(server, HOST)) == target)  # noqa: B023  # within this turn
        print(
            f"to {target} hosts in {took[0]['seconds']:.2f} s, epoch {status['epoch']}: "
            f"longest gap {load.gap:.2f} s"
        )


def test_a_chosen_host_is_drained(server: ServeProcess, admin: AdminClient, undisturbed: list[Told]) -> None:
    names = [host["id"] for host in wait_for_hosts(admin, HOSTS)["hosts"]]
    load = under_load(server, undisturbed, lambda: admin.drain(names[1], replace=True), STREAMS * 10)
    left = [host["id"] for host in wait_for_hosts(admin, HOSTS)["hosts"]]
    assert names[1] not in left and set(names) - {names[1]} < set(left)
    print(f"drained: longest gap {load.gap:.2f} s")


def test_what_cannot_be_is_refused_in_one_line(server: ServeProcess, admin: AdminClient) -> None:
    wait_for_hosts(admin, HOSTS)
    for wrong in (0, 9):
        with pytest.raises(ConfigError, match=f"{wrong} expert hosts cannot be: .* 8 routed experts"):
            admin.scale(wrong)
    with pytest.raises(ConfigError, match="no expert host is nobody"):
        admin.drain("nobody")
    assert admin.status()["wanted"] == HOSTS


@pytest.mark.soak
def test_without_replicas_streams_wait_for_the_reload(tmp_path: Path) -> None:
    model = tiny_model()
    directory = save_model(model, tmp_path / "tiny")
    options = ("--set", f"cluster.expert_hosts={HOSTS}", "--set", "cluster.dead_after=1.0")
    with running(model, directory, tmp_path / "serve.log", *options) as server:
        admin = AdminClient(f"grpc:{server.coordinator}")
        calm = asyncio.run(StreamLoad(server, REQUESTS).run())
        wait_for_hosts(admin, HOSTS, replicas=1)
        load = under_load(server, calm, lambda: actors(server, HOST)[0].kill(), STREAMS * 10)
        moved = [
            event["text"]
            for event in wait_for_hosts(admin, HOSTS, replicas=1)["events"]
            if event["kind"] == "moved"
        ]
        print(f"without replicas: longest gap {load.gap:.2f} s ({'; '.join(moved)})")

        def kill_all() -> None:
            for host in actors(server, HOST):
                host.kill()

        load = under_load(server, calm, kill_all, STREAMS * 10)
        print(f"all hosts killed at once: longest gap {load.gap:.2f} s")
        wait_for_hosts(admin, HOSTS, replicas=1)
        admin.close()
