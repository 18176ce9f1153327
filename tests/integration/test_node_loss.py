"""A cluster of three nodes loses nodes without warning, while serving and while training."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from actors.rpc.admin_client import AdminClient
from jobs.training.metrics_file import METRICS_FILE, read_metrics
from support.commands.disturbed_run import DisturbedRun, differ
from support.commands.losses import IN_A_ROW, wait_for_trunks
from support.commands.serve import running, save_model, tiny_model
from support.commands.streams import StreamLoad, disturbed, greedy_requests
from support.waiting import wait_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    # Ray's own cluster helper leaves its log files and pipes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FREE_PORTS = {"dashboard_agent_listen_port": 0}
STREAMS, TOKENS, STEPS = 8, 100, 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node, and two others."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, **FREE_PORTS}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, **FREE_PORTS)
        yield cluster
    finally:
        cluster.shutdown()


def wait_for_hosts(admin: AdminClient, hosts: int, *, replicas: int) -> list[str]:
    """Wait for so many hosts and for every expert's replicas; return the hosts' nodes."""

    def nodes() -> list[str]:
        status = admin.status()
        serving = [host["node"] for host in status["hosts"] if host["state"] == "serving"]
        return serving if len(serving) == hosts and status["replicas_min"] >= replicas else []

    return wait_until(nodes, seconds=120.0, every=0.1, what=admin.status)


def remove_one_of(cluster: Cluster, nodes: list[str]) -> None:
    """Remove a node, not the head, that has a host."""
    there = [
        node for node in cluster.list_all_nodes() if node is not cluster.head_node and node.node_id in nodes
    ]
    assert there, "all hosts are on the head node"
    cluster.remove_node(there[0], allow_graceful=False)


def test_nodes_are_lost_while_serving(cluster: Cluster, tmp_path: Path, machine: str) -> None:
    directory = save_model(tiny_model(), tmp_path / "tiny")
    settings = {
        "cluster.expert_hosts": 3,
        "cluster.replicas": 2,
        "cluster.dead_after": 2.0,
        "serving.replicas": 2,  # a single replica could be on the removed node
        "serving.cpus_per_replica": 0.5,
    }
    options = [option for name, value in settings.items() for option in ("--set", f"{name}={value}")]
    requests = greedy_requests(STREAMS, TOKENS)
    address = ("--address", cluster.address)
    gaps = []
    with running(tiny_model(), directory, tmp_path / "serve.log", *options, *address) as server:
        admin = AdminClient(f"grpc:{server.coordinator}")
        assert len(set(wait_for_hosts(admin, 3, replicas=2))) == 3, "the hosts are on one another's nodes"
        calm = asyncio.run(StreamLoad(server, requests).run())
        for _ in range(IN_A_ROW):
            nodes = wait_for_hosts(admin, 3, replicas=2)
            wait_for_trunks(server)
            load = StreamLoad(server, requests)
            asyncio.run(disturbed(load, STREAMS * 10, lambda nodes=nodes: remove_one_of(cluster, nodes)))  # type: ignore[misc]
            assert load.told == calm
            gaps.append(load.gap)
            cluster.add_node(num_cpus=2, **FREE_PORTS)
        wait_for_hosts(admin, 3, replicas=2)
        admin.close()
    shown = ", ".join(f"{gap:.2f}" for gap in sorted(gaps))
    print(f"nodes lost in serving, {machine}, {IN_A_ROW} times: longest gaps {shown} s")


def test_a_node_is_lost_while_training(cluster: Cluster, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    for i, begin in enumerate(range(0, len(text), 8000)):
        (corpus / f"{i:02}.txt").write_text(text[begin : begin + 8000], encoding="utf-8")
    runs = []
    for name in ("calm", "lost"):
        run = DisturbedRun(corpus, tmp_path / name, "--address", cluster.address, training__steps=STEPS)
        try:
            if name == "lost":
                admin = run.admin()
                nodes = wait_for_hosts(admin, 3, replicas=1)
                run.at(12, lambda nodes=nodes: remove_one_of(cluster, nodes))  # type: ignore[misc]
                print(f"a node lost in training: next step after {run.pauses[0]:.1f} s")
                admin.close()
            assert run.process.wait(300) == 0
        finally:
            run.stop()
        runs.append([line["main_loss"] for line in read_metrics(run.output / METRICS_FILE)])
    assert len(runs[1]) == STEPS
    assert differ(*runs) <= 1e-9
