"""Several replicas of the trunk in front of the same expert hosts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai.types import Completion

from errors import ConfigError
from jobs.serving.config import ServeConfig
from support.commands.serve import (
    PROMPT,
    TWO_REPLICAS,
    ServeProcess,
    SharedServer,
    save_model,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = [
    pytest.mark.shares("two replicas"),
    pytest.mark.timeout(300),
    # Ray's own code warns of its own settings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
REQUESTS = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(TWO_REPLICAS)


def processes(server: ServeProcess, title: str) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if title in " ".join(child.cmdline())
    ]


def metric(server: ServeProcess, name: str) -> dict[str, float]:
    """Values of a metric, by their labels."""
    rows = (line.rsplit(" ", 1) for line in server.metrics() if line.startswith(f"raymoe_{name}{{"))
    return {labels: float(value) for labels, value in rows}


def test_both_replicas_answer_with_the_same_hosts(server: ServeProcess) -> None:
    assert len(processes(server, "ServeReplica:raymoe:trunk")) == 2
    assert len(server.hosts()) == 3
    assert list(metric(server, "expert_hosts").values()) == [3.0]
    assert list(metric(server, "expert_replicas_min").values()) == [2.0]
    answered = sum(metric(server, "request_success_total").values())
    had = metric(server, "engine_requests")

    async def ask_all() -> list[Completion]:
        async with server.async_client as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model="tiny",
                        prompt=PROMPT,
                        max_tokens=20,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
                    for _ in range(REQUESTS)
                )
            )

    answers = asyncio.run(ask_all())
    tokenizer, _ = tiny_tokenizer()
    assert {answer.choices[0].text for answer in answers} == {tokenizer.decode(server.greedy(20))}
    assert len({answer.system_fingerprint for answer in answers}) == 1
    assert sum(metric(server, "request_success_total").values()) - answered == REQUESTS
    # Both replicas have had requests, and have none any more.
    taken = {of: count - had[of] for of, count in metric(server, "engine_requests").items()}
    assert len(taken) == 2
    assert sum(taken.values()) == REQUESTS
    assert all(taken.values())
    deadline = time.monotonic() + 60
    while any(metric(server, "num_requests_running").values()):
        assert time.monotonic() < deadline


def test_autoscaling_is_handed_to_serve(directory: Path) -> None:
    from ray.serve import Application  # here, where Ray's warnings are ignored

    from jobs.serving.deployment import build_application

    wanted = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 7}
    config = ServeConfig.from_dict({"serving": {"autoscaling": wanted}})
    interface: Any = build_application(config, directory)._bound_deployment
    behind = [one._bound_deployment for one in interface.init_args if isinstance(one, Application)]
    (trunk,) = [deployment for deployment in behind if deployment.name == "trunk"]
    given = trunk._deployment_config.autoscaling_config
    assert {name: getattr(given, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas (2) must be greater"),
        ({"max_replicas": "many"}, "max_replicas: "),
        ({"min_replica": 1}, "no field min_replica"),
        (5, "not a mapping"),
    ],
)
def test_autoscaling_that_cannot_be_is_one_line(value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({"serving": {"autoscaling": value}})
    assert str(caught.value).startswith("serving.autoscaling: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_says_so_before_anything_starts(directory: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli", "serve", str(directory)),
            *("--set", "serving.autoscaling={max_replicas: many}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: serving.autoscaling: ")
    assert len(done.stderr.strip().splitlines()) == 1
