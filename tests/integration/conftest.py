"""Servers, a Ray session, a corpus and a training run that several modules share.

Modules whose `shares` marker has the same name share what they start, until the last of their tests ends.
`tests/conftest.py` has the order of the modules.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import ray

from actors.rpc.admin_client import AdminClient
from support.commands.losses import LossSeries, busy_core
from support.commands.serve import TWO_REPLICAS, SharedServer
from support.commands.train import STEPS, finish, start

_server = SharedServer()


def _shared(item: pytest.Item | None) -> str | None:
    mark = None if item is None else item.get_closest_marker("shares")
    return None if mark is None else mark.args[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End what modules share after the last test that shares it."""
    yield
    if _shared(item) != _shared(nextitem):
        _server.close()
        ray.shutdown()


@pytest.fixture(scope="module")
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedServer]:
    """The server that this module shares; a module with a failed test leaves none to the next one."""
    failed = request.session.testsfailed
    _server.folder = tmp_path_factory.mktemp("server")
    yield _server
    if request.session.testsfailed != failed:
        _server.close()


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """A Ray session of this process, whose actors find functions of test modules."""
    if ray.is_initialized():
        return
    here = os.path.dirname(__file__)
    ray.init(
        address="local",
        num_cpus=2,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([os.path.dirname(here), here])}},
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in several documents."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    for i, begin in enumerate(range(0, len(text), 8000)):
        (folder / f"{i:02}.txt").write_text(text[begin : begin + 8000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result, _ = finish(start(corpus, output))
    assert result["step"] == STEPS
    assert result["interrupted"] is False
    assert result["hosts_per_token"] > 1
    return output


@pytest.fixture(scope="module", params=["quiet", "beside a busy loop"])
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """What else runs."""
    with nullcontext() if request.param == "quiet" else busy_core():
        yield request.param


@pytest.fixture(scope="module")
def losses(shared_server: SharedServer) -> Iterator[LossSeries]:
    """A server whose processes are lost one after the other."""
    server = shared_server.with_settings({**TWO_REPLICAS, "cluster.dead_after": 1.0})
    with closing(AdminClient(f"grpc:{server.coordinator}")) as admin:
        yield LossSeries(server, admin)
