"""`raymoe serve` with two expert hosts, called by the official client."""

from __future__ import annotations

import asyncio
import http.client
import random
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import openai
import psutil
import pytest
from openai import AsyncOpenAI
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from actors.rpc.host_client import HostClient
from cluster.topology import HostInfo
from errors import RaymoeError
from jobs.cli.app import app
from support.commands.serve import (
    ONE_REPLICA,
    PROMPT,
    ServeProcess,
    SharedServer,
    save_model,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("one replica")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(ONE_REPLICA, grpc=True)


def test_the_server_says_what_the_model_says(server: ServeProcess) -> None:
    expected = server.greedy(24)
    choice = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}, logprobs=0
    ).choices[0]
    tokenizer, _ = tiny_tokenizer()
    assert choice.text == tokenizer.decode(expected)
    assert choice.logprobs is not None
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    for token, shown in zip(expected, choice.logprobs.tokens or [], strict=True):
        own = bytes(byte_of[character] for character in tokenizer.id_to_token(token))
        assert shown == (own.decode() if own.isascii() else f"bytes:\\x{own.hex()}")


def test_the_official_client_with_every_parameter(server: ServeProcess) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}],
        max_completion_tokens=8,
        temperature=0.7,
        top_p=0.9,
        n=2,
        seed=5,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"65": 3},
        logprobs=True,
        top_logprobs=3,
        stop=["zzz"],
        user="me",
        extra_body={
            "top_k": 50,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
        },
    )
    assert len(whole.choices) == 2
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 8
    text = ""
    usage = None
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "the cat"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    again = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the cat"}], max_tokens=8, temperature=0
    )
    assert text == again.choices[0].message.content
    assert usage is not None
    assert again.usage is not None
    assert usage.completion_tokens == again.usage.completion_tokens


def test_errors_reach_the_official_client_as_its_own(server: ServeProcess) -> None:
    client = server.client
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"


def test_many_at_once_get_what_each_gets_alone(server: ServeProcess) -> None:
    def alone(index: int) -> str:
        answer = server.client.completions.create(
            model="tiny", prompt=PROMPT[: 3 + index % 10], max_tokens=4 + index, temperature=0.8, seed=index
        )
        return answer.choices[0].text

    async def together() -> list[str]:
        async with server.async_client as client:

            async def one(index: int) -> str:
                stream = await client.completions.create(
                    model="tiny",
                    prompt=PROMPT[: 3 + index % 10],
                    max_tokens=4 + index,
                    temperature=0.8,
                    seed=index,
                    stream=True,
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(12)))

    assert asyncio.run(together()) == [alone(index) for index in range(12)]


def test_two_hundred_dropped_requests_leave_nothing(server: ServeProcess) -> None:
    source = random.Random(0)

    async def drop(client: AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        left = source.randint(0, 5)
        async for _ in stream:
            left -= 1
            if left < 0:
                break
        await stream.close()

    async def all_of_them() -> None:
        async with server.async_client as client:
            for _ in range(10):
                await asyncio.gather(*(drop(client) for _ in range(20)))

    asyncio.run(all_of_them())
    deadline = time.monotonic() + 60
    while any(server.gauges().values()):
        assert time.monotonic() < deadline, server.gauges()
    while kept_by_hosts(server) != [0, 0]:
        assert time.monotonic() < deadline, kept_by_hosts(server)
    assert server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).usage is not None


def kept_by_hosts(server: ServeProcess) -> list[int]:
    """Number of activations that each expert host keeps, asked at each of its ports that answers."""
    kept = []
    for host in server.hosts():
        for connection in host.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr.ip.endswith("127.0.0.1"):
                continue
            address = f"grpc:127.0.0.1:{connection.laddr.port}"
            client = HostClient(HostInfo(id="host", addresses={"grpc": address}), timeout=5)
            try:
                kept.append(client.stats().kept)
            except RaymoeError:
                continue
            finally:
                client.close()
    return kept


def test_expert_hosts_of_an_embedded_cluster_listen_on_the_loopback(server: ServeProcess) -> None:
    hosts = server.hosts()
    assert len(hosts) == 2
    # Beside Ray's ports, each host has a gRPC port of raymoe.
    for host in hosts:
        listening = {c.laddr.ip for c in host.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert any(address.endswith("127.0.0.1") for address in listening)


def test_a_killed_host_is_not_missed(server: ServeProcess) -> None:
    """The killed host's experts are loaded elsewhere, and another host takes its place."""

    def health() -> int:
        address = server.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status

    def answer() -> str:
        asked = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
        text: str = asked.choices[0].text
        return text

    assert health() == 200
    before, text = server.hosts(), answer()
    before[0].kill()
    assert answer() == text
    deadline = time.monotonic() + 60
    while health() != 200 or len(set(server.hosts()) - {before[0]}) < len(before):
        assert time.monotonic() < deadline
    assert answer() == text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray's own code
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), "safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json"),
        (
            lambda d: (d / "chat_template.jinja").write_text("{% for"),
            "chat_template.jinja cannot be read: line 1",
        ),
    ],
)
def test_an_incomplete_model_is_refused_before_anything_starts(
    directory: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    damage(broken)
    done = CliRunner().invoke(app, ["serve", str(broken)])
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
