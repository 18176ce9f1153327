"""Ray's autoscaler and expert hosts: nodes appear for hosts that are wanted, and go when these have gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import AutoscalingCluster
from serving import running, save_model, tiny_model
from streams import Load, disturbed, greedy_requests

from actors.coordinator_client import AdminClient

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    # Ray's own cluster helper leaves its log files and pipes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RESOURCE = "raymoe_expert_host"
STREAMS, TOKENS = 8, 60


@pytest.fixture
def cluster() -> Iterator[AutoscalingCluster]:
    """A head node, and nodes for one expert host each that are added where one finds no room."""
    nodes = {"resources": {"CPU": 0, RESOURCE: 1}, "node_config": {}, "min_workers": 0, "max_workers": 4}
    cluster = AutoscalingCluster(
        head_resources={"CPU": 4},
        worker_node_types={"expert": nodes},
        autoscaler_v2=True,
        idle_timeout_minutes=0.1,
    )
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def expert_nodes(address: str) -> set[str]:
    """Nodes for expert hosts that are alive."""
    with ray.init(address=address, log_to_driver=False, logging_level="error"):
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and RESOURCE in node["Resources"]}


def wait_for_nodes(address: str, count: int) -> set[str]:
    deadline = time.monotonic() + 180
    while len(found := expert_nodes(address)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(1)
    return found


def test_nodes_follow_the_scale_under_traffic(cluster: AutoscalingCluster, tmp_path: Path) -> None:
    directory = save_model(tiny_model(), tmp_path / "tiny")
    settings = {
        "cluster.expert_hosts": 1,
        "cluster.cpus_per_host": 0,
        "cluster.host_resources": f"{{{RESOURCE}: 1}}",
        "serving.cpus_per_replica": 0.5,
    }
    options = [option for name, value in settings.items() for option in ("--set", f"{name}={value}")]
    requests = greedy_requests(STREAMS, TOKENS)
    address = ("--address", "auto")
    with running(tiny_model(), directory, tmp_path / "serve.log", *options, *address) as server:
        assert len(wait_for_nodes(server.ray, 1)) == 1
        calm = asyncio.run(Load(server, requests).run())
        admin = AdminClient(f"grpc:{server.coordinator}")
        for target in (4, 1):
            began = time.monotonic()
            load = asyncio.run(
                disturbed(Load(server, requests), STREAMS * 5, lambda n=target: admin.scale(n, timeout=240.0))  # type: ignore[misc]
            )
            assert load.told == calm
            scaled = time.monotonic() - began
            nodes = wait_for_nodes(server.ray, target)
            hosts = admin.status()["hosts"]
            assert {host["node"] for host in hosts} == nodes
            print(
                f"to {target} hosts in {scaled:.1f} s, {target} expert nodes after "
                f"{time.monotonic() - began:.1f} s: longest gap {load.gap:.2f} s"
            )
        admin.close()
