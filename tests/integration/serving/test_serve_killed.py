"""Replicas of the trunk are killed or hang in mid-stream: no request fails, no answer changes."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psutil
import pytest

from actors.rpc.admin_client import AdminClient
from support.commands.losses import (
    SaidLines,
    answering_trunks,
    expert_hosts,
    request,
    trunks,
    wait_for_trunks,
)
from support.commands.serve import PROMPT, TWO_REPLICAS, ServeProcess, SharedServer
from support.commands.streams import INTERFACE, StreamLoad, Told, actors
from support.waiting import wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.shares("two replicas")]
COUNT = 160
STREAMS = 12


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(TWO_REPLICAS)


REQUESTS = [request(index, COUNT) for index in range(STREAMS)]


@pytest.fixture(scope="module")
def undisturbed(server: ServeProcess) -> list[Told]:
    wait_for_trunks(server)
    told = asyncio.run(StreamLoad(server, REQUESTS).run())
    assert all(reason == "length" for *_, reason in told)
    return told


async def disturbed(server: ServeProcess, at: list[int], disturb: Callable[[], object]) -> StreamLoad:
    """Run the load and disturb it whenever one of these numbers of chunks has come."""
    load = StreamLoad(server, REQUESTS)
    running = asyncio.create_task(load.run())
    for count in at:
        while load.chunks < count and not running.done():
            await asyncio.sleep(0.002)
        assert not running.done()
        await asyncio.to_thread(disturb)
    await running
    return load


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_replica_costs_time_and_nothing_else(
    server: ServeProcess, undisturbed: list[Told], seed: int
) -> None:
    wait_for_trunks(server)
    said = SaidLines(server)
    source = random.Random(seed)
    at = source.randrange(STREAMS, STREAMS * COUNT // 2)
    load = asyncio.run(disturbed(server, [at], lambda: source.choice(trunks(server)).kill()))
    assert load.told == undisturbed
    print(f"killed after {at} chunks: longest gap between two chunks {load.gap:.2f} s")
    dead = said.wait(r"died: trunk replica (\w+): its process ended").group(1)
    said.wait(rf"replaced: trunk replica \w+ serves in place of {dead}$")
    with closing(AdminClient(f"grpc:{server.coordinator}")) as admin:
        events = [(event["kind"], event["text"]) for event in admin.status()["events"]]
    assert events.count(("died", f"trunk replica {dead}: its process ended")) == 1


@pytest.mark.soak
def test_replicas_that_are_killed_one_after_the_other(server: ServeProcess, undisturbed: list[Told]) -> None:
    """The second replica is killed as soon as Serve has restarted the first."""
    wait_for_trunks(server)
    killed: list[psutil.Process] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while answering_trunks(server) < 2:
            assert time.monotonic() < deadline
        killed.append(next(one for one in trunks(server) if one not in killed))
        killed[-1].kill()

    load = asyncio.run(disturbed(server, [STREAMS * 10], kill))
    assert load.told == undisturbed
    load = asyncio.run(disturbed(server, [STREAMS * 20], kill))
    assert load.told == undisturbed
    assert len(killed) == 2


def test_all_replicas_killed_at_once_are_waited_for(server: ServeProcess, undisturbed: list[Told]) -> None:
    wait_for_trunks(server)

    def kill() -> None:
        for one in trunks(server):
            one.kill()

    load = asyncio.run(disturbed(server, [STREAMS * 30], kill))
    assert load.told == undisturbed
    print(f"all killed: longest gap between two chunks {load.gap:.2f} s")


def test_a_replica_that_hangs_is_given_up(server: ServeProcess, undisturbed: list[Told]) -> None:
    wait_for_trunks(server)
    said, hung = SaidLines(server), list[psutil.Process]()

    def stop() -> None:
        hung.append(trunks(server)[0])
        hung[0].send_signal(signal.SIGSTOP)

    try:
        load = asyncio.run(disturbed(server, [STREAMS * 20], stop))
        given_up = said.wait(r"died: trunk replica (\w+): silent for 5 s").group(1)
        # The pool answers the other processes meanwhile.
        wait_until(lambda: expert_hosts(server) == TWO_REPLICAS["cluster.expert_hosts"], seconds=5.0)
    finally:
        hung[0].send_signal(signal.SIGCONT)
    assert load.told == undisturbed
    said.wait(f"returned: trunk replica {given_up} answers again$")
    print(f"hung: longest gap between two chunks {load.gap:.2f} s")


def test_the_death_of_an_interface_process_is_told(server: ServeProcess) -> None:
    wait_for_trunks(server)
    said = SaidLines(server)
    (interface,) = actors(server, INTERFACE)
    interface.kill()
    dead = said.wait(r"died: interface process (\w+): its process ended").group(1)
    said.wait(rf"replaced: interface process \w+ serves in place of {dead}$")
    wait_until(lambda: answering_trunks(server), seconds=120.0, every=0.2, ignoring=OSError)


def rounded(choices: list[Any]) -> Any:
    """The choices as data, log probabilities rounded: their last digits depend on the batch."""
    return json.loads(
        json.dumps([choice.model_dump() for choice in choices]),
        parse_float=lambda text: round(float(text), 6),
    )


def test_answers_in_one_piece_and_conversations_survive_as_well(server: ServeProcess) -> None:
    wait_for_trunks(server)

    async def ask_all() -> list[Any]:
        async with server.async_client as client:

            def ask() -> asyncio.Future[list[Any]]:
                whole = [
                    client.completions.create(
                        **{**request(index, COUNT), "n": 2, "temperature": 0.9, "seed": 5}
                    )
                    for index in range(4)
                ]
                chats = [
                    client.chat.completions.create(
                        model="tiny",
                        messages=[{"role": "user", "content": PROMPT}],
                        max_tokens=COUNT,
                        seed=index,
                        extra_body={"ignore_eos": True},
                    )
                    for index in range(4)
                ]
                return asyncio.gather(*whole, *chats)

            asking = ask()
            if kill:
                while not any((await asyncio.to_thread(server.gauges)).values()):
                    if asking.done():  # all ended between two looks
                        asking = ask()
                    await asyncio.sleep(0.01)
                trunks(server)[0].kill()
            answers = await asking
        return [
            (answer.usage.model_dump(exclude={"prompt_tokens_details"}), rounded(answer.choices))
            for answer in answers
        ]

    kill = False
    calm = asyncio.run(ask_all())
    kill = True
    assert asyncio.run(ask_all()) == calm
    wait_for_trunks(server)  # stopping the server would wait for a replica that is starting
