"""Replicas of the trunk are killed or hang in mid-stream: no request fails, no answer changes."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from support.commands.serve import PROMPT, TWO_REPLICAS, ServeProcess, SharedServer
from support.commands.streams import TRUNK, StreamLoad, Told, actors
from support.waiting import wait_until

pytestmark = [pytest.mark.timeout(600), pytest.mark.shares("two replicas")]
COUNT = 160
STREAMS = 12


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(TWO_REPLICAS)


def request(index: int) -> dict[str, Any]:
    """A completion request: greedy, seeded, with penalties or with log probabilities, by its index."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": index, "logprobs": 2},
        {"temperature": 0.8, "seed": index, "presence_penalty": 0.5, "top_p": 0.95},
        {"temperature": 0.0, "logprobs": 0, "echo": True, "frequency_penalty": 0.3},
    ]
    return {
        "model": "tiny",
        "prompt": PROMPT[: 3 + index % 11],
        "max_tokens": COUNT + index,
        "extra_body": {"ignore_eos": True},
        **kinds[index % len(kinds)],
    }


def trunks(server: ServeProcess) -> list[psutil.Process]:
    """The processes of the server's trunk replicas."""
    return actors(server, TRUNK)


REQUESTS = [request(index) for index in range(STREAMS)]


def engines(server: ServeProcess) -> int:
    """Number of trunk replicas that answer."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(line.startswith("raymoe_num_requests_running{") for line in lines)


def all_there(server: ServeProcess) -> None:
    wait_until(lambda: engines(server) >= 2, seconds=120.0, every=0.2)


@pytest.fixture(scope="module")
def undisturbed(server: ServeProcess) -> list[Told]:
    all_there(server)
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
    all_there(server)
    source = random.Random(seed)
    at = source.randrange(STREAMS, STREAMS * COUNT // 2)
    load = asyncio.run(disturbed(server, [at], lambda: source.choice(trunks(server)).kill()))
    assert load.told == undisturbed
    print(f"killed after {at} chunks: longest gap between two chunks {load.gap:.2f} s")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_twenty_replicas_are_lost(server: ServeProcess, undisturbed: list[Told], how: signal.Signals) -> None:
    gaps = []
    for seed in range(20):
        all_there(server)
        source = random.Random(seed)
        at = source.randrange(STREAMS, STREAMS * COUNT // 2)
        lost = source.choice(trunks(server))
        load = asyncio.run(disturbed(server, [at], lambda lost=lost: lost.send_signal(how)))  # type: ignore[misc]
        assert load.told == undisturbed
        gaps.append(load.gap)
        with suppress(psutil.NoSuchProcess):
            lost.kill()
        lost.wait(60)
    print(f"{how.name} 20 times: longest gaps {', '.join(f'{gap:.2f}' for gap in sorted(gaps))} s")


@pytest.mark.soak
def test_replicas_that_are_killed_one_after_the_other(server: ServeProcess, undisturbed: list[Told]) -> None:
    """The second replica is killed as soon as Serve has restarted the first."""
    all_there(server)
    killed: list[psutil.Process] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while engines(server) < 2:
            assert time.monotonic() < deadline
        killed.append(next(one for one in trunks(server) if one not in killed))
        killed[-1].kill()

    load = asyncio.run(disturbed(server, [STREAMS * 10], kill))
    assert load.told == undisturbed
    load = asyncio.run(disturbed(server, [STREAMS * 20], kill))
    assert load.told == undisturbed
    assert len(killed) == 2


def test_all_replicas_killed_at_once_are_waited_for(server: ServeProcess, undisturbed: list[Told]) -> None:
    all_there(server)

    def kill() -> None:
        for one in trunks(server):
            one.kill()

    load = asyncio.run(disturbed(server, [STREAMS * 30], kill))
    assert load.told == undisturbed
    print(f"all killed: longest gap between two chunks {load.gap:.2f} s")


def test_a_replica_that_hangs_is_given_up(server: ServeProcess, undisturbed: list[Told]) -> None:
    all_there(server)
    hung: list[psutil.Process] = []

    def stop() -> None:
        hung.append(trunks(server)[0])
        hung[0].send_signal(signal.SIGSTOP)

    try:
        load = asyncio.run(disturbed(server, [STREAMS * 20], stop))
    finally:
        hung[0].send_signal(signal.SIGCONT)
    assert load.told == undisturbed
    print(f"hung: longest gap between two chunks {load.gap:.2f} s")


def rounded(choices: list[Any]) -> Any:
    """The choices as data, log probabilities rounded: their last digits depend on the batch."""
    return json.loads(
        json.dumps([choice.model_dump() for choice in choices]),
        parse_float=lambda text: round(float(text), 6),
    )


def test_answers_in_one_piece_and_conversations_survive_as_well(server: ServeProcess) -> None:
    all_there(server)

    async def ask_all() -> list[Any]:
        async with server.async_client as client:
            whole = [
                client.completions.create(**{**request(index), "n": 2, "temperature": 0.9, "seed": 5})
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
            asking = asyncio.gather(*whole, *chats)
            if kill:
                while not any((await asyncio.to_thread(server.gauges)).values()):
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
    all_there(server)  # stopping the server would wait for a replica that is starting
