"""`raymoe reload` under live traffic of the official client, with two replicas and three expert hosts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import AsyncOpenAI

from model.causal_lm import CausalLM
from support.commands.serve import (
    PROMPT,
    TWO_REPLICAS,
    ServeProcess,
    SharedServer,
    greedy,
    running,
    save_model,
    tiny_model,
    tiny_tokenizer,
)
from support.commands.streams import HOST, actors

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("two replicas")]
OLD = "tiny"  # the directory that the server begins with, and the name of its model
PROMPTS = [PROMPT, "the mat and", "the hat", "a cat on the mat sat"]
COUNT = 24


@dataclass(frozen=True)
class Answer:
    """The answer to one request, and when the request began and ended."""

    prompt: str
    text: str
    versions: tuple[str, ...]
    began: float
    ended: float


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {OLD: tiny_model(0), "new": tiny_model(1)}


@pytest.fixture(scope="module")
def directories(models: dict[str, CausalLM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(model, folder / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def expected(models: dict[str, CausalLM]) -> dict[str, dict[str, str]]:
    """Name of the version's directory -> prompt -> text of greedy decoding."""
    tokenizer, _ = tiny_tokenizer()
    return {
        name: {prompt: tokenizer.decode(greedy(model, prompt, COUNT)) for prompt in PROMPTS}
        for name, model in models.items()
    }


def reload(server: ServeProcess, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli", "reload", str(directory), "--json"),
            *("--address", server.ray, *options),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    )


def reloaded(server: ServeProcess, directory: Path) -> dict[str, Any]:
    done = reload(server, directory)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def served(server: ServeProcess, directory: Path) -> None:
    """Reload the checkpoint unless it is the one in use."""
    if not server.client.models.list().data[0].model_dump()["version"].startswith(f"{directory.name}-"):
        reloaded(server, directory)


async def ask(client: AsyncOpenAI, prompt: str, count: int = COUNT) -> Answer:
    began = time.monotonic()
    stream = await client.completions.create(
        model=OLD,
        prompt=prompt,
        max_tokens=count,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, versions, reason = "", [], None
    async for chunk in stream:
        versions.append(str(chunk.system_fingerprint))
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "length"
    return Answer(prompt, text, tuple(versions), began, time.monotonic())


async def traffic(server: ServeProcess, streams: int, enough: asyncio.Event) -> list[Answer]:
    """Send requests one after the other on several streams until `enough` is set; return the answers."""
    async with server.async_client as client:

        async def one(index: int) -> list[Answer]:
            answers: list[Answer] = []
            while not enough.is_set():
                answers.append(await ask(client, PROMPTS[(index + len(answers)) % len(PROMPTS)]))
            return answers

        return [answer for some in await asyncio.gather(*map(one, range(streams))) for answer in some]


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> Iterator[ServeProcess]:
    yield shared_server.with_settings(TWO_REPLICAS)
    shared_server.close()  # it serves other weights now


def test_reloads_under_traffic_lose_nothing_and_mix_nothing(
    server: ServeProcess, directories: dict[str, Path], expected: dict[str, dict[str, str]]
) -> None:
    async def scene() -> tuple[list[Answer], list[tuple[float, float, dict[str, Any]]]]:
        enough = asyncio.Event()
        asking = asyncio.create_task(traffic(server, 12, enough))
        calm: list[Answer] = []
        reloads: list[tuple[float, float, dict[str, Any]]] = []
        async with server.async_client as client:
            for name in ("new", OLD, None):
                calm += await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS * 2))
                if name is not None:
                    began = time.monotonic()
                    result = await asyncio.to_thread(reloaded, server, directories[name])
                    reloads.append((began, time.monotonic(), result))
        enough.set()
        return calm + await asking, reloads

    answers, reloads = asyncio.run(scene())
    assert len(answers) > 50
    for _, _, result in reloads:
        assert (result["replicas"], result["expert_hosts"]) == (2, 3)
    # Between two reloads there is one version; during one, an answer has either version or changes over.
    calm = [(0.0, reloads[0][0], OLD)]
    calm += [
        (ended, following, result["version"].split("-")[0])
        for (_, ended, result), following in zip(
            reloads, [*(began for began, _, _ in reloads[1:]), float("inf")], strict=True
        )
    ]
    judged = 0
    for answer in answers:
        names = [version.split("-")[0] for version in answer.versions]
        for began, ended, name in calm:
            if began <= answer.began and answer.ended <= ended:
                judged += 1
                assert set(names) == {name}
                assert answer.text == expected[name][answer.prompt]
        if len(set(names)) == 1:
            assert answer.text == expected[names[0]][answer.prompt]
    assert judged >= 3 * 2 * len(PROMPTS)
    assert {name for answer in answers for name in (answer.versions[-1].split("-")[0],)} == {OLD, "new"}


def test_a_request_on_its_way_goes_on_with_the_new_weights(
    server: ServeProcess, models: dict[str, CausalLM], directories: dict[str, Path]
) -> None:
    served(server, directories[OLD])

    async def scene() -> tuple[list[Answer], dict[str, Any]]:
        async with server.async_client as client:
            long = [asyncio.create_task(ask(client, prompt, 450)) for prompt in PROMPTS * 4]
            result = await asyncio.to_thread(reloaded, server, directories["new"])
            return await asyncio.gather(*long), result

    answers, result = asyncio.run(scene())
    over = [answer for answer in answers if len(set(answer.versions)) == 2]
    for answer in over:
        assert answer.versions[0] == result["previous"]
        assert answer.versions[-1] == result["version"]
        assert len({*zip(answer.versions, answer.versions[1:], strict=False)}) == 3  # it changed once
    for answer in answers:
        assert len(set(answer.versions)) <= 2
    model = server.client.models.list().data[0]
    assert model.id == OLD  # the name that clients use stays
    assert model.model_dump()["version"] == result["version"]


def test_a_checkpoint_that_does_not_fit_is_refused_and_the_old_one_is_served_on(
    server: ServeProcess, directories: dict[str, Path], expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    served(server, directories["new"])
    incomplete = tmp_path / "incomplete"
    shutil.copytree(directories[OLD], incomplete)
    next(incomplete.glob("*.safetensors")).unlink()
    shape = save_model(tiny_model(2, n_shared_experts=2), tmp_path / "shape")
    for directory, said in (
        (incomplete, "safetensors"),
        (shape, "n_shared_experts is 2"),
        (tmp_path, "config"),
    ):
        done = reload(server, directory)
        assert done.returncode == 2
        *before, last = done.stderr.splitlines()
        assert said in last
        assert all(line.startswith("reloads tiny (") for line in before), done.stderr
    answer = server.client.completions.create(
        model=OLD, prompt=PROMPT, max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == expected["new"][PROMPT]
    assert str(answer.system_fingerprint).startswith("new-")
    again = reloaded(server, directories["new"])
    assert again["version"] == again["previous"]
    assert (again["job"]["name"], again["job"]["cluster"]) == (OLD, server.ray)


def replica_processes(server: ServeProcess, deployment: str) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if f"ServeReplica:raymoe:{deployment}" in " ".join(child.cmdline())
    ]


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def answer_in_time(server: ServeProcess, seconds: float = 120) -> tuple[str, str]:
    """Ask until a request succeeds; return its text and version."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = server.client.completions.create(
                model=OLD, prompt=PROMPT, max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text, str(answer.system_fingerprint)
        except openai.APIError:
            assert time.monotonic() < deadline


@pytest.mark.soak
def test_a_replica_that_starts_later_begins_with_the_weights_in_use(
    server: ServeProcess, directories: dict[str, Path], expected: dict[str, dict[str, str]]
) -> None:
    served(server, directories["new"])
    replicas = replica_processes(server, "trunk")
    assert len(replicas) == 2
    kill(replicas)
    text, version = answer_in_time(server)
    assert text == expected["new"][PROMPT]
    assert version.startswith("new-")


@pytest.mark.soak
def test_hosts_that_die_in_the_middle_of_a_reload_do_not_stop_it(
    server: ServeProcess, directories: dict[str, Path], expected: dict[str, dict[str, str]]
) -> None:
    for name, after in ((OLD, 0.0), ("new", 0.5), (OLD, 1.0), ("new", 2.0)):
        hosts = actors(server, HOST)
        timer = threading.Timer(after, hosts[0].kill)
        timer.start()
        reloaded(server, directories[name])
        timer.join()
        text, version = answer_in_time(server)
        assert text == expected[name][PROMPT]
        assert version.startswith(f"{name}-")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--address", "127.0.0.1:1"), 1, "no Ray cluster at 127.0.0.1:1"),
        (("--app", "other"), 2, "the Serve application 'other' is not there"),
    ],
)
def test_without_a_deployment_there_is_nothing_to_reload(
    server: ServeProcess, directories: dict[str, Path], options: tuple[str, ...], code: int, said: str
) -> None:
    done = reload(server, directories[OLD], *options)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.soak
def test_a_pool_that_crashes_comes_back_with_the_checkpoint_of_the_deployment(
    server: ServeProcess, directories: dict[str, Path], expected: dict[str, dict[str, str]]
) -> None:
    """The deployment goes back to its first checkpoint, so this test is the last with this server."""
    served(server, directories["new"])
    pool = replica_processes(server, "experts")
    assert len(pool) == 1
    kill(pool)
    text, version = answer_in_time(server)
    while not version.startswith(f"{OLD}-"):  # a replica may answer until it knows the new pool
        text, version = answer_in_time(server)
    assert text == expected[OLD][PROMPT]
    reloaded(server, directories["new"])
    text, version = answer_in_time(server)
    assert version.startswith("new-")
    assert text == expected["new"][PROMPT]


@pytest.mark.soak
def test_experts_in_the_replica_are_reloaded_with_it(
    models: dict[str, CausalLM],
    directories: dict[str, Path],
    expected: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    options = ("--set", "cluster.expert_hosts=0")
    with running(models[OLD], directories[OLD], tmp_path / "serve.log", *options) as server:
        for name in (OLD, "new"):
            reloaded(server, directories[name])
            answer = server.client.completions.create(
                model=OLD, prompt=PROMPT, max_tokens=COUNT, temperature=0, extra_body={"ignore_eos": True}
            )
            assert answer.choices[0].text == expected[name][PROMPT]
            assert str(answer.system_fingerprint).startswith(f"{name}-")
