"""The front of `raymoe serve`: what needs a key, its loss and return, and where Serve runs already."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from support.commands.serve import (
    KEY,
    ONE_REPLICA,
    PROMPT,
    ServeProcess,
    SharedServer,
    free_port,
    running,
    save_model,
    tiny_model,
)
from support.commands.streams import actors
from support.waiting import wait_until

pytestmark = [pytest.mark.timeout(300), pytest.mark.shares("one replica")]


@pytest.fixture(scope="module")
def server(shared_server: SharedServer) -> ServeProcess:
    return shared_server.with_settings(ONE_REPLICA, grpc=True)


def asked(port: int, path: str, *, key: str | None = None) -> int:
    """The status of a request for a path."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def status(server: ServeProcess, path: str, *, key: str | None = None) -> int:
    return asked(int(server.url.rpartition(":")[2]), path, key=key)


def haproxies(server: ServeProcess) -> list[psutil.Process]:
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in found if child.name() == "haproxy"]


def answers(server: ServeProcess) -> bool:
    done = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2)
    return done.usage is not None


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/redoc", "/openapi.json", "/-/routes"])
def test_paths_need_the_key(server: ServeProcess, path: str) -> None:
    assert status(server, path) == 401
    assert status(server, path, key="wrong") == 401
    assert status(server, path, key=KEY) == 200


def test_health_needs_no_key(server: ServeProcess) -> None:
    assert [status(server, path) for path in ("/health", "/-/healthz")] == [200, 200]


def test_a_body_without_a_key_is_refused_before_it_is_sent(server: ServeProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 16777216\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401")


def test_serves_own_proxy_is_reached_from_this_machine_alone(server: ServeProcess) -> None:
    proxies = actors(server, "ProxyActor")
    port = int(server.url.rpartition(":")[2])
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for proxy in proxies
        for connection in proxy.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert port not in {number for _, number in listening}
    assert any(address == "127.0.0.1" for address, _ in listening)


def test_a_killed_haproxy_is_back_within_seconds(server: ServeProcess) -> None:
    (before,) = haproxies(server)
    before.kill()
    wait_until(lambda: answers(server), seconds=30, ignoring=Exception, every=0.1)
    (after,) = haproxies(server)
    assert after.pid != before.pid
    wait_until(lambda: "front: its HAProxy has ended" in server.log.read_text(), seconds=30)


def test_a_killed_front_takes_its_haproxy_along_and_is_back_within_seconds(server: ServeProcess) -> None:
    (front,) = actors(server, "ServeReplica:raymoe:front")
    (before,) = haproxies(server)
    front.kill()
    psutil.wait_procs([before], timeout=20)
    assert not before.is_running()
    wait_until(lambda: answers(server), seconds=90, ignoring=Exception, every=0.1)
    assert len(haproxies(server)) == 1
    assert status(server, "/metrics", key=KEY) == 200
    assert status(server, "/metrics") == 401


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster on which Ray Serve runs, with ports of its own."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "dashboard_agent_listen_port": 0},
    )
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own helper for clusters
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray's own code
def test_where_serve_runs_already_the_url_is_that_of_the_front(cluster: Cluster, tmp_path: Path) -> None:
    from ray import serve as ray_serve  # warns of its own code

    from jobs.serving.serve import app as build

    ray.init(cluster.address, log_to_driver=False)
    theirs = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": theirs})
    directory = save_model(tiny_model(), tmp_path / "tiny")
    options = ("--address", cluster.address, "--set", "cluster.expert_hosts=0")
    with running(tiny_model(), directory, tmp_path / "serve.log", *options) as server:
        assert int(server.url.rpartition(":")[2]) != theirs
        assert answers(server)
    serving = {"cpus_per_replica": 0.5, "api_keys": [f"sha256:{sha256(KEY.encode()).hexdigest()}"]}
    args = {"checkpoint": str(directory), "cluster": {"expert_hosts": 0}, "serving": serving}
    listen = {"port": free_port(), "metrics_port": free_port()}
    ray_serve.run(build(args | {"listen": listen}), name="built")
    assert asked(listen["port"], "/metrics") == 401
    assert asked(listen["port"], "/v1/models", key=KEY) == 200
    assert asked(listen["metrics_port"], "/metrics") == 200
    assert asked(listen["metrics_port"], "/v1/models", key=KEY) == 404
    ray_serve.delete("built")
    done = subprocess.run(
        [*(sys.executable, "-m", "jobs.cli", "serve", str(directory), "--port", str(theirs)), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f"--port {theirs} is that of Ray Serve's own HTTP proxy" in done.stderr.splitlines()[-1]
    with closing(http.client.HTTPConnection("127.0.0.1", theirs, timeout=30)) as connection:
        connection.request("GET", "/-/healthz")  # Serve itself stays
        assert connection.getresponse().status == 200
